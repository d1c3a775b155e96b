"""Linear attention for pretrained Transformers models.

Importing the package registers the attention kinds with Transformers' AttentionInterface, and the converted models
with its Auto classes. Everything else is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .integrations.interface import register_kinds
from .integrations.names import watch_names
from .integrations.seams import attempt
from .models import register_auto_classes

if TYPE_CHECKING:  # what editors and type checkers see of the names below
    from . import functional as functional
    from . import training as training
    from .conversion import calibrate as calibrate
    from .conversion import convert as convert
    from .conversion import extend_positions as extend_positions
    from .conversion import needs_calibration as needs_calibration
    from .conversion import revert as revert
    from .conversion import set_image_size as set_image_size
    from .conversion.compare import compare as compare
    from .errors import CheckpointError as CheckpointError
    from .errors import ConfigError as ConfigError
    from .errors import InputError as InputError
    from .errors import LinAttnError as LinAttnError
    from .errors import UncalibratedError as UncalibratedError
    from .errors import UnknownFieldError as UnknownFieldError
    from .errors import UnsupportedError as UnsupportedError
    from .errors import UnsupportedTransformersError as UnsupportedTransformersError
    from .modules.kinds.eva import EvaConfig as EvaConfig
    from .modules.kinds.favor_plus import FavorPlusConfig as FavorPlusConfig
    from .modules.kinds.favor_sharp import FavorSharpConfig as FavorSharpConfig
    from .modules.kinds.lara import LaraConfig as LaraConfig
    from .modules.registry import list_kinds as list_kinds

register_kinds()
attempt(watch_names)
register_auto_classes()

# Public name -> module that defines it.
_LAZY: dict[str, str] = {
    "EvaConfig": "hf_linattn.modules.kinds.eva",
    "FavorPlusConfig": "hf_linattn.modules.kinds.favor_plus",
    "FavorSharpConfig": "hf_linattn.modules.kinds.favor_sharp",
    "LaraConfig": "hf_linattn.modules.kinds.lara",
    "list_kinds": "hf_linattn.modules.registry",
    "convert": "hf_linattn.conversion.convert",
    "revert": "hf_linattn.conversion.convert",
    "calibrate": "hf_linattn.conversion.calibrate",
    "needs_calibration": "hf_linattn.conversion.calibrate",
    "extend_positions": "hf_linattn.conversion.positions",
    "set_image_size": "hf_linattn.conversion.image_size",
    "compare": "hf_linattn.conversion.compare",
    "LinAttnError": "hf_linattn.errors",
    "ConfigError": "hf_linattn.errors",
    "UnknownFieldError": "hf_linattn.errors",
    "UnsupportedError": "hf_linattn.errors",
    "InputError": "hf_linattn.errors",
    "CheckpointError": "hf_linattn.errors",
    "UncalibratedError": "hf_linattn.errors",
    "UnsupportedTransformersError": "hf_linattn.errors",
    **{
        f"LinAttn{name}": f"hf_linattn.models.{module}"
        for module, names in {
            "bert": (
                "BertConfig",
                "BertModel",
                "BertForPreTraining",
                "BertLMHeadModel",
                "BertForMaskedLM",
                "BertForNextSentencePrediction",
                "BertForSequenceClassification",
                "BertForMultipleChoice",
                "BertForTokenClassification",
                "BertForQuestionAnswering",
            ),
            "gpt2": (
                "GPT2Config",
                "GPT2Model",
                "GPT2LMHeadModel",
                "GPT2DoubleHeadsModel",
                "GPT2ForSequenceClassification",
                "GPT2ForTokenClassification",
                "GPT2ForQuestionAnswering",
            ),
            "vit": ("ViTConfig", "ViTModel", "ViTForImageClassification", "ViTForMaskedImageModeling"),
        }.items()
        for name in names
    },
}
_LAZY_MODULES = ("functional", "training")

__all__ = ["__version__", *_LAZY, *_LAZY_MODULES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
    elif name in _LAZY_MODULES:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
