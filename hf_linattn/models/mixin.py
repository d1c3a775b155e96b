"""What turns a stock model class into its converted counterpart."""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..distributed.fully_sharded import is_part, whole_state
from ..errors import CheckpointError, ConfigError, InputError
from ..integrations.adapters import name_as_unsaved
from ..integrations.attach import (
    ATTRIBUTE,
    attach,
    build_layers,
    check_consistent,
    check_unchanged,
    family_layers,
    settings_of,
)
from ..integrations.canary import check_seams
from ..integrations.expected import changed
from ..integrations.families import MODEL_TYPE_PREFIX, defaults_family
from ..integrations.model_seams import initialize, loading_info, set_model_class, writes_files
from ..integrations.packing import check_has_positions
from ..integrations.seams import attention_of, causal_mask, find_cache
from ..integrations.settings import LinearAttentionSettings, parse_settings
from ..modules.base import LinearAttention
from ..modules.registry import get_kind, list_kinds
from .config import check_attention
from .publishing import push_folder
from .saving import check_saveable, save_atomically
from .signatures import forward_of, init_of, signed_like
from .torn_saves import load_consistently

_KEY = f".{ATTRIBUTE}."
# Mark of attention modules that Transformers has told to initialise themselves.
_INITIALIZED = "_was_initialized"


class LinAttnMixin:
    """Put before a stock class among the bases: `class LinAttnBertModel(LinAttnBertMixin, BertModel)`."""

    base_model_class: ClassVar[type[PreTrainedModel]]  # the converted class of the model inside a head

    # What calls the stock `forward` where processes share sequences (`training/context_parallel.py`).
    sequence_parallel: Callable[..., Any] | None = None

    def __init__(self, config: PreTrainedConfig, *inputs: Any, **kwargs: Any) -> None:
        # DeepSpeed takes apart modules that are made while it makes a model: it waits for the first call.
        check_seams(None if "deepspeed" in sys.modules else config.model_type)
        settings = settings_of(config)
        if not isinstance(config, self.config_class):  # type: ignore[attr-defined]
            wanted = self.config_class.__name__  # type: ignore[attr-defined]
            raise ConfigError(
                f"{type(self).__name__} needs a {wanted}; got {type(config).__name__}. Make one with "
                f"{wanted}.from_pretrained(name, linear_attention=kind)."
            )
        check_attention(config)
        asked_for = attention_of(config)
        super().__init__(config, *inputs, **kwargs)  # type: ignore[call-arg]
        active = attention_of(self.config)  # type: ignore[attr-defined]
        if asked_for in list_kinds() and active != asked_for:
            raise changed("model methods", f"{active!r} in a model whose config says {asked_for!r}")
        inner = self.base_model  # type: ignore[attr-defined]
        if inner is not self:
            # Transformers initialises weights through the innermost model, so that one has to be ours too.
            set_model_class(inner, self.base_model_class)
        attach(self, settings, build_layers(family_layers(self), settings))
        self.post_init()  # type: ignore[attr-defined]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock: Any = cls.__bases__[-1]
        if not issubclass(stock, LinAttnMixin):
            cls.__init__, cls.forward = init_of(cls, stock), forward_of(stock)  # type: ignore[method-assign,attr-defined]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, LinearAttention):
            for name, value in module.initial_state().items():
                initialize(getattr(module, name), value)
            setattr(module, _INITIALIZED, True)

    def check_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of `forward`, checked, and completed where a class has something to add."""
        config = self.config  # type: ignore[attr-defined]
        if attention_of(config) in list_kinds():
            wanted = kwargs.get("output_attentions")
            if config.output_attentions if wanted is None else wanted:
                raise InputError(
                    "output_attentions=True has no answer in a model with linear attention: there are no attention "
                    "weights. Call model.set_attn_implementation('eager') first to get those of softmax attention."
                )
            check_unchanged(self, kwargs.get("is_causal"))
            check_has_positions(config, kwargs)
        check_seams(config.model_type)
        _check_positions(config, args, kwargs)
        return args, kwargs

    @staticmethod
    def create_masks_for_generate(
        config: PreTrainedConfig, inputs_embeds: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> Any:
        """The mask that `generate` makes for a compiled forward: one for all layers, always of the same shape."""
        positions = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
        return causal_mask(config, inputs_embeds, attention_mask, find_cache(args, kwargs), positions)

    @classmethod
    @signed_like(PreTrainedModel.from_pretrained.__func__, "linear_attention")
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers. Loads stock checkpoints too, given `linear_attention=` (or a config that has it).

        Args:
            linear_attention: A kind's name, its settings object, or a dictionary as in config.json.
        Raises: `CheckpointError` if a converted checkpoint lacks tensors that its config asks for, or has others.
        """
        check_seams(cls.config_class.model_type)  # type: ignore[attr-defined]
        with_info = kwargs.pop("output_loading_info", False)
        allow_mismatch = kwargs.pop("ignore_mismatched_sizes", False)
        load = super().from_pretrained  # type: ignore[misc]
        options = {"output_loading_info": True, "ignore_mismatched_sizes": True, **kwargs}
        model, info = load_consistently(load, pretrained_model_name_or_path, *args, **options)
        for layer in model.modules():
            if isinstance(layer, LinearAttention):
                layer.invalidate()  # Transformers fills tensors without load_state_dict
        _check_loaded(model, info, pretrained_model_name_or_path, allow_mismatch=allow_mismatch, kwargs=kwargs)
        return (model, info) if with_info else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        token: str | bool | None = None,
        save_peft_format: bool = True,
        save_original_format: bool = False,
        distributed_checkpoint: bool = False,
        **kwargs: Any,
    ) -> None:
        """As in Transformers, with these differences.

        * safetensors only.
        * A save that is cut off leaves the checkpoint that was there, or the new one.
        * With `push_to_hub`, what this save wrote is uploaded, and a model card; nothing else that is in the folder.
        * What FSDP2 has sharded is gathered, in a `state_dict` that is given too. All processes have to call this;
          one of them writes.
        * `save_original_format` is False: weights keep the names they have in the model, so that a Trainer can resume
          a ViT (it loads them by name, without renaming).
        """
        if not kwargs.pop("safe_serialization", True):
            raise CheckpointError(
                "safe_serialization must be True: checkpoints are written in the safetensors format only. Drop the "
                "argument."
            )
        arguments = {
            "is_main_process": is_main_process,
            "state_dict": state_dict,
            "max_shard_size": max_shard_size,
            "variant": variant,
            "save_peft_format": save_peft_format,
            "save_original_format": save_original_format,
            "distributed_checkpoint": distributed_checkpoint,
        }
        if distributed_checkpoint:  # every rank writes its part straight into the folder
            super().save_pretrained(save_directory, push_to_hub=push_to_hub, token=token, **arguments, **kwargs)  # type: ignore[misc]
            return
        check_consistent(self)
        check_saveable(self, state_dict)
        save = super().save_pretrained  # type: ignore[misc]
        writes = writes_files(self, is_main_process)
        own: Any = self
        parts = own.parameters() if state_dict is None else state_dict.values()
        if own.tp_size is None and any(map(is_part, parts)):  # what Transformers has split it gathers by itself
            writes = writes and torch.distributed.get_rank() == 0
            arguments["state_dict"] = whole_state(own.state_dict() if state_dict is None else state_dict, keep=writes)
            if not writes:
                return
        names = save_atomically(save, save_directory, arguments, writes=writes)
        if push_to_hub and writes:
            repo_id = kwargs.pop("repo_id", os.path.basename(os.path.normpath(os.fspath(save_directory))))
            push_folder(self, save_directory, names, repo_id, variant=variant, token=token, **kwargs)

    @signed_like(PreTrainedModel.push_to_hub)
    def push_to_hub(self, repo_id: str, *, max_shard_size: int | str = "50GB", **kwargs: Any) -> str:
        """Upload weights, config and a model card. Arguments as in Transformers; returns the commit's address."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            return push_folder(self, folder, os.listdir(folder), repo_id, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Does nothing: the class lives in an installed package, so there is no code to copy into a checkpoint."""


def _check_positions(config: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise `InputError` for a text that is longer than the table of positions: on a GPU only a failed assertion."""
    most = getattr(config, "max_position_embeddings", None)
    ids = kwargs.get("input_ids", args[0] if args else None)
    tokens = kwargs.get("inputs_embeds") if ids is None else ids
    if most is None or not isinstance(tokens, Tensor) or tokens.ndim < 2 or torch.compiler.is_compiling():
        return
    cache = find_cache(args, kwargs)
    seen = 0 if cache is None else cache.get_seq_length()
    length = tokens.shape[1] + (seen if isinstance(seen, int) else 0)
    positions = kwargs.get("position_ids")
    if length <= most or (isinstance(positions, Tensor) and (positions.is_meta or int(positions.max()) < most)):
        return
    raise InputError(
        f"The model has {most} positions; got a text of {length} tokens. Shorten it, or give the model more:"
        f" hf_linattn.extend_positions(model, {1 << (length - 1).bit_length()})."
    )


def _check_loaded(
    model: PreTrainedModel, info: dict[str, Any], source: Any, *, allow_mismatch: bool, kwargs: dict[str, Any]
) -> None:
    """Raise if weights and config disagree about the linear attention, instead of starting from fresh tensors."""
    expected = {name for name in model.state_dict() if _KEY in name}
    missing, unexpected, mismatched = loading_info(info)
    missing, unexpected = ({name for name in names if _KEY in name} for names in (missing, unexpected))
    _check_initialized(model, missing)
    ours = [name for name in mismatched if _KEY in name]
    fresh = bool(expected) and missing == expected and not unexpected and not ours
    saved = _saved_settings(model, source, kwargs)
    asked = settings_of(model.config)
    if saved is None:
        name_as_unsaved(model, asked.config.kind)
    if fresh and saved is not None and saved.config == asked.config and saved.layers == asked.layers:
        raise CheckpointError(
            f"{source!r} says that it is a converted model, but its weights hold no linear attention tensors "
            f"(expected {_some(missing)}). The checkpoint is incomplete: save it again, or convert the stock "
            "checkpoint anew."
        )
    found = [
        f"{what} {_some(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", ours))
        if names and (saved is not None or not fresh)
    ]
    if saved is not None:
        # Tensors of the same names and shapes may mean something else.
        fields = ("kind", "layers", "seed", *get_kind(saved.config.kind).checkpoint_fields)
        # What settings leave out of their dictionary has its default.
        old, new = ({**dataclasses.asdict(s.config), **s.to_dict()} for s in (saved, asked))
        found = [f"{name} {old[name]!r} in config.json" for name in fields if old.get(name) != new.get(name)] + found
    if found:
        raise CheckpointError(
            f"The weights of {source!r} contradict `linear_attention` = {model.config.linear_attention!r}: "
            f"{'; '.join(found)}. Use the settings that the checkpoint was saved with; to change the kind, revert the "
            "model and convert it again."
        )
    if mismatched and not allow_mismatch:
        raise RuntimeError(
            f"Some weights of {source!r} have another shape than in {type(model).__name__}: {_some(mismatched)}. Pass "
            "ignore_mismatched_sizes=True to start these from fresh values."
        )


def _check_initialized(model: PreTrainedModel, missing: set[str]) -> None:
    """Raise if tensors that the checkpoint lacks were not filled: they hold whatever was in memory."""
    for name, module in model.named_modules():
        if not isinstance(module, LinearAttention) or getattr(module, _INITIALIZED, False):
            continue
        if any(key.startswith(f"{name}.") for key in missing):
            raise changed("initialised weights", f"no call for {name}")


def _some(names: Any) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def _saved_settings(model: PreTrainedModel, source: Any, kwargs: dict[str, Any]) -> LinearAttentionSettings | None:
    """`linear_attention` in a converted checkpoint's own config.json.

    `None` if there is none: a stock checkpoint, or no checkpoint but a state dict.
    """
    if source is None:
        return None
    names = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
    try:
        values, _ = PreTrainedConfig.get_config_dict(source, **{k: kwargs[k] for k in names if k in kwargs})
    except OSError:
        return None
    if not str(values.get("model_type", "")).startswith(MODEL_TYPE_PREFIX):
        return None
    family, count = defaults_family(model.config), model.config.num_hidden_layers
    return parse_settings(values["linear_attention"], family=family, num_layers=count)
