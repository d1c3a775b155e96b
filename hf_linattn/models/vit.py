"""ViT with linear attention: the config, and one class per head that Transformers has."""

from __future__ import annotations

import functools
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import ViTConfig, ViTForImageClassification, ViTForMaskedImageModeling, ViTModel

from ..integrations.model_seams import share_weight_names
from ..integrations.native import as_pair
from .config import LinAttnConfigMixin
from .mixin import LinAttnMixin
from .signatures import signed_like


@strict
class LinAttnViTConfig(LinAttnConfigMixin, ViTConfig):
    """`ViTConfig` with `linear_attention`: a kind's name, its settings, or the dictionary that config.json holds."""

    model_type = "linattn_vit"

    linear_attention: Any = None


@functools.cache
def _register_renaming() -> None:
    """Let Transformers rename the weights of ViT checkpoints for our base model as it does for its own.

    Checkpoints of ViT name their weights differently from the model; without this a stock one would load with every
    encoder weight at its random initial value. Transformers builds all its mappings for this, which takes a good part
    of a second, so it is done when a model is first loaded or saved, not at import.
    """
    share_weight_names("LinAttnViTModel", "ViTModel")


class LinAttnViTMixin(LinAttnMixin):
    config_class = LinAttnViTConfig

    @classmethod
    @signed_like(LinAttnMixin.from_pretrained.__func__)
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        _register_renaming()
        return super().from_pretrained(*args, **kwargs)

    @signed_like(LinAttnMixin.save_pretrained)
    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        _register_renaming()
        super().save_pretrained(*args, **kwargs)


class LinAttnViTModel(LinAttnViTMixin, ViTModel):
    """`ViTModel` with linear attention in the layers that `config.linear_attention` names."""

    def check_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = super().check_call(args, kwargs)
        pixels = args[0] if args else kwargs.get("pixel_values")
        patch = as_pair(self.config.patch_size)
        if pixels is not None and patch is not None:
            # Images may be larger than config.image_size (interpolate_pos_encoding) and need not be square.
            kwargs["grid"] = (pixels.shape[-2] // patch[0], pixels.shape[-1] // patch[1])
        return args, kwargs


LinAttnViTMixin.base_model_class = LinAttnViTModel


class LinAttnViTForImageClassification(LinAttnViTMixin, ViTForImageClassification):
    """`ViTForImageClassification` with linear attention."""


class LinAttnViTForMaskedImageModeling(LinAttnViTMixin, ViTForMaskedImageModeling):
    """`ViTForMaskedImageModeling` with linear attention."""
