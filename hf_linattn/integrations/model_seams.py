"""The seams to how Transformers makes, saves and loads models (`seams.py` has the others)."""

from __future__ import annotations

from typing import Any

import transformers
from torch import Tensor, nn

from .expected import changed, describe

try:  # what is not used here is for the other files
    from transformers import AutoConfig  # noqa: F401
    from transformers import initialization as init
    from transformers.utils import CONFIG_NAME, output_capturing  # noqa: F401
except ImportError as error:
    raise changed("names", describe(error)) from error


def set_model_class(model: Any, cls: type) -> None:
    """Turn a model into another class with the same attributes, keeping `output_hidden_states` working."""
    model.__class__ = cls
    # Transformers looks up by class what a model can record; normally a model's __init__ enters it.
    registry = output_capturing._CAN_RECORD_REGISTRY
    registry[str(cls) if type(registry) is dict else model] = model._can_record_outputs


# The class methods that make a model: the Auto classes end in one of them.
MAKERS = ("from_pretrained", "_from_config")


def mark_initialized(module: nn.Module, is_initialized: bool) -> None:
    """Say whether Transformers may initialise a module again, as it does with a model put into another one."""
    module._is_hf_initialized = is_initialized  # type: ignore[assignment]


def initialize(tensor: Tensor, value: Tensor) -> None:
    """Fill a tensor within `_init_weights`, unless a checkpoint has filled it."""
    init.copy_(tensor, value)


def writes_files(model: Any, is_main_process: bool) -> bool:
    """Whether this process writes what `save_pretrained` saves."""
    return getattr(model, "should_save_on_this_rank", bool)(is_main_process)  # unknown to older releases


# In config.json: the weight file to load, relative to the folder, instead of those with the usual names.
WEIGHTS_POINTER = "transformers_weights"


def loading_info(info: Any) -> tuple[set[str], set[str], list[str]]:
    """Names of missing, unexpected and mismatched tensors in what `output_loading_info=True` returns."""
    try:
        missing, unexpected, mismatched = (info[f"{name}_keys"] for name in ("missing", "unexpected", "mismatched"))
        return set(missing), set(unexpected), sorted(str(entry[0]) for entry in mismatched)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise changed("loading", describe(error)) from error


def share_weight_names(name: str, stock_name: str) -> None:
    """Let Transformers rename the weights of checkpoints for one class as it does for another."""
    try:
        from transformers.conversion_mapping import (
            get_checkpoint_conversion_mapping,
            register_checkpoint_conversion_mapping,
        )

        mapping = get_checkpoint_conversion_mapping(stock_name)
        if not mapping:
            raise LookupError(f"no renaming for {stock_name}")
        register_checkpoint_conversion_mapping(name, mapping, overwrite=True)
    except (ImportError, LookupError, TypeError, AttributeError) as error:
        raise changed("weight names", describe(error)) from error


def auto_class(name: str) -> Any:
    """An Auto class; not all are in Transformers' own namespace."""
    from transformers.models.auto import modeling_auto

    return getattr(transformers, name, None) or getattr(modeling_auto, name)


def preprocessing_tables() -> tuple[Any, Any]:
    """Where AutoTokenizer and AutoImageProcessor look up what belongs to a config class."""
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

    return TOKENIZER_MAPPING, IMAGE_PROCESSOR_MAPPING


def share_preprocessing(config_class: type, stock_model_type: str) -> None:
    """Let AutoTokenizer and AutoImageProcessor treat a config class as the stock one, without loading either."""
    for mapping in preprocessing_tables():
        # Not `register`: it needs the processor's class, whose import may bring torchvision along.
        mapping._reverse_config_mapping[config_class.__name__] = stock_model_type
