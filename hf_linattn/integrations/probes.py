"""How each seam is tried out on the installed Transformers.

Where it can, a probe uses the thing on a few numbers (a cache of two layers, a mask of three tokens; in
`family_probes.py` an attention module of four channels) instead of comparing names: what is renamed without
consequences passes, what does something else does not. They are asked in the order in which they stand.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import GPT2Config

from ..errors import UnsupportedError
from ..modules.registry import list_kinds
from . import model_seams, seams
from .expected import expects
from .families import FAMILIES, MODEL_TYPE_PREFIX
from .users import asks_interface


def lacks(function: Any, *names: str) -> str | None:
    """What to say of a function that does not take all the arguments."""
    parameters = inspect.signature(function).parameters
    if all(name in parameters for name in names):
        return None
    return f"{getattr(function, '__qualname__', function)}({', '.join(parameters)})"


def tiny_config(layers: list[str] | None = None, **fields: Any) -> Any:
    """A decoder of two channels under a kind."""
    config = GPT2Config(n_embd=2, n_head=1, n_layer=2, vocab_size=4, bos_token_id=0, eos_token_id=0, **fields)
    seams.select_attention(config, list_kinds()[0])
    if layers is not None:
        config.layer_types = layers
    return config


def _empty_model() -> Any:
    """A stock model of two channels, without values."""
    with torch.device("meta"):
        return transformers.GPT2Model(tiny_config(n_positions=2))


@expects("_attn_implementation of a config to be stored as _attn_implementation_internal")
def config() -> str | None:
    config = tiny_config()
    if config.__dict__.get(seams.STORED_ATTENTION) != list_kinds()[0]:
        return f"no {seams.STORED_ATTENTION} in {sorted(name for name in config.__dict__ if 'attn' in name)}"
    given = tiny_config(attn_implementation="eager").to_dict()
    if "attn_implementation" in given:
        return "attn_implementation in a saved config"
    wanted = ("get_text_config", "output_attentions", "num_hidden_layers", "validate_layer_type", "get_config_dict")
    missing = [name for name in wanted if not hasattr(config, name)]
    return f"no {missing}" if missing else None


# -- attention and masks --------------------------------------------------------------------------------------------
@expects("ALL_ATTENTION_FUNCTIONS.get_interface to give what AttentionInterface registered")
def attention_functions() -> str | None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for kind in list_kinds():
        found = ALL_ATTENTION_FUNCTIONS.get_interface(kind, None)
        if getattr(found, "__name__", None) != f"{kind}_attention":
            return f"{found!r} for {kind!r}"
    return None


@expects(
    "create_causal_mask and create_bidirectional_mask(config, inputs_embeds, attention_mask, cache) to call the "
    "registered mask function with the plain pattern, and to return its mask unchanged"
)
def mask_functions() -> str | None:
    from transformers.masking_utils import create_bidirectional_mask

    config, embeds = tiny_config(), torch.zeros(1, 3, 2)
    padding, positions = torch.tensor([[0, 1, 1]]), torch.tensor([[0, 1, 2]])
    cases = {
        "create_causal_mask": seams.causal_mask(config, embeds, padding, None),
        "create_bidirectional_mask": create_bidirectional_mask(config, embeds, padding),
        "create_causal_mask with position_ids": seams.causal_mask(config, embeds, padding, None, positions),
    }
    for name, mask in cases.items():
        tokens = getattr(mask, "tokens", None) if type(mask).__name__ == "TokenMask" else None
        if not isinstance(tokens, Tensor) or tuple(tokens.shape) != (1, 3):
            return f"{type(mask).__name__} from {name}"
        if tokens.tolist() != [[False, True, True]]:
            return f"{tokens.tolist()} for a mask of {padding.tolist()} from {name}"
    return None


@expects("is_tracing(tensor) to say whether values can be read")
def tracing() -> str | None:
    answers = seams.is_tracing(), seams.is_tracing(None), seams.is_tracing(torch.zeros(1))
    return None if all(isinstance(answer, bool) for answer in answers) else f"{answers}"


@expects("sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, is_causal)")
def softmax_attention() -> str | None:
    lacking = lacks(seams.sdpa_attention_forward, "dropout", "scaling", "is_causal")
    if lacking:
        return lacking
    query = torch.ones(1, 1, 2, 4, device="meta")
    found = seams.softmax_attention(nn.Module(), query, query, query, None, scaling=0.5, is_causal=False)
    if tuple(found.shape) != (1, 2, 1, 4):
        return f"an output of shape {tuple(found.shape)}"
    ones, value = torch.ones(1, 1, 2, 4), torch.tensor([1.0, 3.0]).view(1, 1, 2, 1).expand(1, 1, 2, 4)
    mask = torch.tensor([True, False]).view(1, 1, 1, 2).expand(1, 1, 2, 2)
    hidden = seams.softmax_attention(nn.Module(), ones, ones, value, mask, scaling=0.5, is_causal=False)
    causal = seams.softmax_attention(nn.Module(), ones, ones, value, None, scaling=0.5, is_causal=True)
    got = hidden[0, :, 0, 0].tolist(), causal[0, :, 0, 0].tolist()
    return None if got == ([1.0, 1.0], [1.0, 2.0]) else f"{got} of the values 1 and 3"


@expects("create_masks_for_generate(config, inputs_embeds, attention_mask, cache)")
def masks_of_generate() -> str | None:
    from transformers.masking_utils import create_masks_for_generate

    return lacks(create_masks_for_generate, "config", "inputs_embeds", "attention_mask")


# -- models ---------------------------------------------------------------------------------------------------------
@expects("_CAN_RECORD_REGISTRY to hold by class what a model records")
def recorded_outputs() -> str | None:
    class Recording:
        _can_record_outputs: Any = None

    model, recorded = Recording(), {"hidden_states": Recording}
    model._can_record_outputs = recorded
    model_seams.set_model_class(model, Recording)
    registry = model_seams.output_capturing._CAN_RECORD_REGISTRY
    found = registry.pop(str(Recording), None)
    return None if found is recorded else f"{found!r}"


@expects(
    "set_attn_implementation, get_correct_attn_implementation, post_init and base_model of a model, and the attention "
    "that was set to stay"
)
def model_methods() -> str | None:
    wanted = ("set_attn_implementation", "get_correct_attn_implementation", "post_init", "base_model", "__call__")
    missing = [name for name in wanted if not hasattr(seams.PreTrainedModel, name)]
    if missing:
        return f"no {missing}"
    model = _empty_model()
    for kind in list_kinds():
        model.set_attn_implementation(kind)
        if seams.attention_of(model.config) != kind:
            return f"{seams.attention_of(model.config)!r} after set_attn_implementation({kind!r})"
    return None


@expects(
    "the constructor of a model to call post_init, a name to be given by set_attn_implementation, and attention "
    "modules to find their function in ALL_ATTENTION_FUNCTIONS"
)
def names_given_to_models() -> str | None:
    class Deaf(seams.PreTrainedModel):
        config_class = GPT2Config

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.post_init()

    kind = list_kinds()[0]
    stock = tiny_config()
    seams.select_attention(stock, "eager")
    for give in (lambda: Deaf(tiny_config()), lambda: Deaf(stock).set_attn_implementation(kind)):
        try:
            give()
        except UnsupportedError:
            continue
        return f"a model without attention layers that takes the name {kind!r}"
    from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

    return None if asks_interface(GPT2Attention) else "GPT2Attention, which does not"


@expects("_init_weights(module) of a model, and initialization.copy_ to spare loaded tensors")
def initialisation() -> str | None:
    class Target:
        """Counts what is written to it; a tensor would have to be read."""

        def __init__(self, is_loaded: bool) -> None:
            self._is_hf_initialized, self.writes = is_loaded, 0

        def copy_(self, other: Any) -> Target:
            self.writes += 1
            return self

    loaded, fresh = Target(True), Target(False)
    for target in (loaded, fresh):
        model_seams.initialize(target, torch.zeros(1))  # type: ignore[arg-type]
    if (loaded.writes, fresh.writes) != (0, 1):
        return f"{loaded.writes} writes to a loaded tensor, {fresh.writes} to a fresh one"
    model = _empty_model()
    with torch.device("meta"):
        model.ln_f.ours, model.ln_f.new = nn.Linear(1, 1), nn.Linear(1, 1)
    for module in (model, model.ln_f, model.ln_f.new):
        model_seams.mark_initialized(module, False)
    model_seams.mark_initialized(model.ln_f.ours, True)
    told: list[Any] = []
    model._init_weights = told.append
    model.initialize_weights()
    if any(module is model.ln_f.ours for module in told) or not any(module is model.ln_f.new for module in told):
        return "_init_weights called for a module marked as initialised, or not for a new one"
    return lacks(seams.PreTrainedModel._init_weights, "module")


@expects("save_pretrained(is_main_process, state_dict, max_shard_size, variant, save_original_format)")
def saving() -> str | None:
    names = "is_main_process", "state_dict", "max_shard_size", "variant", "save_peft_format", "save_original_format"
    return lacks(seams.PreTrainedModel.save_pretrained, *names)


@expects("AutoConfig.register and register of the Auto model classes to fill their tables")
def auto_classes() -> str | None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    for family in FAMILIES:
        config_class = CONFIG_MAPPING[MODEL_TYPE_PREFIX + family]
        found = MODEL_MAPPING[config_class]
        if found.__name__ != config_class.__name__.removesuffix("Config") + "Model":
            return f"{found.__name__} for {config_class.__name__}"
    return None


@expects("TOKENIZER_MAPPING and IMAGE_PROCESSOR_MAPPING to find a class by _reverse_config_mapping")
def preprocessing() -> str | None:
    for mapping in model_seams.preprocessing_tables():
        found = mapping._reverse_config_mapping
        if found["BertConfig"] != "bert" or found["LinAttnBertConfig"] != "bert":
            return f"{found.get('BertConfig')!r} for BertConfig, {found.get('LinAttnBertConfig')!r} for ours"
    return None


# -- training ---------------------------------------------------------------------------------------------------------
@expects("TrainerCallback.on_train_begin and on_step_end with state.global_step", when="trainer")
def trainer_events() -> str | None:
    callback, state = transformers.TrainerCallback, transformers.TrainerState()
    missing = [name for name in ("on_train_begin", "on_step_end") if not hasattr(callback, name)]
    if missing or not isinstance(state.global_step, int):
        return f"no {missing or 'global_step'}"
    from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

    told: list[Any] = []

    class Spy(DefaultFlowCallback):  # without one of these the handler warns
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            told.append(model)

    model = nn.Module()
    CallbackHandler([Spy()], model, None, None, None).on_step_end(None, state, transformers.TrainerControl())
    return None if told == [model] else f"on_step_end with model={told}"
