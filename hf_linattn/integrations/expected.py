"""What this library expects of Transformers, in words, and the one sentence for what has changed."""

from __future__ import annotations

from dataclasses import dataclass

import transformers

from ..errors import UnsupportedTransformersError

# The oldest and the newest release of Transformers in the table of docs/compatibility.md.
TESTED_RELEASES = ("5.10.4", "5.24.0")


@dataclass(frozen=True)
class Seam:
    """One thing that this library needs Transformers to do: its name, what is expected, and when the canary asks."""

    name: str
    expects: str
    when: str


# At the first touch of a model.
_ALWAYS = {
    "config": "_attn_implementation of a config to be stored as _attn_implementation_internal",
    "attention functions": "ALL_ATTENTION_FUNCTIONS.get_interface to give what AttentionInterface registered",
    "mask functions": (
        "create_causal_mask and create_bidirectional_mask(config, inputs_embeds, attention_mask, cache) to call the "
        "registered mask function with the plain pattern, and to return its mask unchanged"
    ),
    "tracing": "is_tracing(tensor) to say whether values can be read",
    "softmax attention": "sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, is_causal)",
    "dynamic cache": "DynamicCache(config) to make the cache layers that config.layer_types names",
    "static cache": "StaticCache(config, max_cache_len) to make the cache layers that config.layer_types names",
    "cache layers": (
        "a Cache to pass update, get_seq_length, get_mask_sizes, crop, reset, reorder_cache, batch_select_indices "
        "and batch_repeat_interleave on to its layers"
    ),
    "encoder-decoder cache": "EncoderDecoderCache to hold self_attention_cache and cross_attention_cache",
    "masks of generate": "create_masks_for_generate(config, inputs_embeds, attention_mask, cache)",
    "recorded outputs": "_CAN_RECORD_REGISTRY to hold by class what a model records",
    "model methods": (
        "set_attn_implementation, get_correct_attn_implementation, post_init and base_model of a model, and the "
        "attention that was set to stay"
    ),
    "names given to models": (
        "the constructor of a model to call post_init, a name to be given by set_attn_implementation, and attention "
        "modules to find their function in ALL_ATTENTION_FUNCTIONS"
    ),
    "initialisation": "_init_weights(module) of a model, and initialization.copy_ to spare loaded tensors",
    "saving": "save_pretrained(is_main_process, state_dict, max_shard_size, variant, save_original_format)",
    "auto classes": "AutoConfig.register and register of the Auto model classes to fill their tables",
    "preprocessing": "TOKENIZER_MAPPING and IMAGE_PROCESSOR_MAPPING to find a class by _reverse_config_mapping",
}
# At the first touch of a BERT, GPT-2 or ViT.
_FAMILY = {
    "attention modules": (
        "a layer to update the cache, then to call the attention function with (module, query, key, value, mask, "
        "scaling=, dropout=) and what it was passed besides"
    ),
    "forward arguments": "forward of a base model to take the inputs by their names, and others",
    "models": (
        "a model under an attention of ours to hand padding, positions and the cache to its layers, so that a row "
        "does not depend on its padding, a token on later ones, or a continued text on the cache"
    ),
}
# When the callback is made.
_TRAINER = {
    "trainer events": "TrainerCallback.on_train_begin and on_step_end with state.global_step",
}
# Never: only using it can tell, and the code there raises.
_USE = {
    "names": "the classes and functions that hf_linattn imports",
    "arguments of a mask function": (
        "batch_size, q_length, kv_length, q_offset, kv_offset, mask_function and attention_mask, and no other that "
        "changes a mask"
    ),
    "cache in use": (
        "a converted layer's forward to be given the Cache, to update it, and to pass unknown arguments on to the "
        "attention function"
    ),
    "cache argument": "a model's forward to have one argument for a Cache",
    "initialised weights": "from_pretrained to call _init_weights for modules that a checkpoint lacks",
    "loading": "output_loading_info to list missing, unexpected and mismatched keys",
    "weight names": "a renaming of ViT checkpoints that can be registered for another class",
    "layers of a model": "the attention modules to be where families.py looks for them",
    "position buffers": "buffers as long as the table of positions to be position_ids and token_type_ids",
    "scaling": "attention functions to be given the scaling of the layer",
}
_GROUPS = {"always": _ALWAYS, "family": _FAMILY, "trainer": _TRAINER, "use": _USE}
SEAMS = {name: Seam(name, expects, when) for when, group in _GROUPS.items() for name, expects in group.items()}


def changed(name: str, found: str) -> UnsupportedTransformersError:
    """The error to raise for a seam that is not as expected: one sentence that says what, where and what to do."""
    newest = TESTED_RELEASES[-1]
    return UnsupportedTransformersError(
        f"hf_linattn does not work with {installed()}: {name}: expected {SEAMS[name].expects}; found {found}: install"
        f" a tested release (pip install 'transformers=={newest}') or a newer hf_linattn (pip install -U hf-linattn)."
    )


def installed() -> str:
    """The installed release beside those that are tested, for messages."""
    return f"the installed Transformers {transformers.__version__} (tested: {' to '.join(TESTED_RELEASES)})"


def describe(error: BaseException) -> str:
    """An error as what was found in place of the expected."""
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:300]
