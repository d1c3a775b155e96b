"""What the configs of converted models have in common: the field `linear_attention`."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError
from ..integrations.canary import check_seams
from ..integrations.families import MODEL_TYPE_PREFIX, defaults_family, get_family
from ..integrations.hand_over import cache_layer_types
from ..integrations.seams import STORED_ATTENTION, attention_of
from ..integrations.settings import parse_settings
from ..modules.registry import list_kinds


def check_attention(config: Any) -> None:
    """Raise `ConfigError` if a config selects another attention than its settings: what is loaded is what they say."""
    settings, active = getattr(config, "linear_attention", None), attention_of(config)
    if settings is None or active in (None, settings["kind"]):
        return
    raise ConfigError(
        f"attn_implementation must be {settings['kind']!r}, as `linear_attention` says, or left out; got {active!r} "
        "(an argument, or a key of config.json): the model would compute something else than its settings say. "
        "For softmax attention with its weights, load the model without it and call hf_linattn.revert(model). To see "
        "attention weights: model.set_attn_implementation('eager')."
    )


class LinAttnConfigMixin:
    """Adds `linear_attention` to a stock config.

    The field accepts a kind's name, a kind's settings object or a dictionary, and always holds the canonical
    dictionary (`LinearAttentionSettings.to_dict`), whether it is given to the constructor, through `from_pretrained`,
    or assigned.
    """

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("model_type", None)  # that of a stock config.json read through this class
        settings = getattr(self, "linear_attention", None)
        if settings is not None and kwargs.get("attn_implementation") is None:
            # Never saved by Transformers, so it has to follow from the settings.
            kwargs["attn_implementation"] = settings["kind"]
        super().__post_init__(**kwargs)  # type: ignore[misc]
        check_attention(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == STORED_ATTENTION and value is None:
            # A composite config resets its parts' implementation to "not chosen" when it is read: then as above.
            value = (self.__dict__.get("linear_attention") or {}).get("kind")
        if name != "linear_attention" or value is None:
            super().__setattr__(name, value)
            return
        family = get_family(self)
        settings = parse_settings(value, family=defaults_family(self), num_layers=self.num_hidden_layers)  # type: ignore[attr-defined]
        values = settings.to_dict()
        # A linear kind cannot apply attention dropout: it is remembered for the softmax layers and for `revert`.
        if settings.attention_dropout is None:
            remembered = (self.__dict__.get("linear_attention") or {}).get("attention_dropout", 0.0)
            values["attention_dropout"] = float(getattr(self, family.dropout_field)) or remembered
        setattr(self, family.dropout_field, 0.0)
        super().__setattr__(name, values)
        active = self.__dict__.get(STORED_ATTENTION)
        if STORED_ATTENTION in self.__dict__ and (active is None or active in list_kinds()):
            setattr(self, STORED_ATTENTION, settings.config.kind)

    @property
    def layer_types(self) -> list[str]:
        """Which cache each layer needs, for Transformers: a state, or keys and values. Follows from the settings.

        There is no such attribute where all layers keep keys and values: an encoder, or a model switched to softmax.
        """
        types = cache_layer_types(self)
        if types is None:
            raise AttributeError("layer_types")
        check_seams()  # what asks is about to make a cache
        return types

    def validate_layer_type(self) -> None:
        """Does nothing: Transformers' list of types does not have ours."""

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in Transformers; a stock config.json counts as one of this class, so that no warning is given for it."""
        values, unused = super().get_config_dict(*args, **kwargs)  # type: ignore[misc]
        own: str = cls.model_type  # type: ignore[attr-defined]
        if values.get("model_type") == own.removeprefix(MODEL_TYPE_PREFIX):
            values = {**values, "model_type": own}
        return values, unused

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Does nothing: the class lives in an installed package, so there is no code to copy into a checkpoint."""
