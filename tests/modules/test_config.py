"""Settings: every field out of range, unknown fields, dictionary form, defaults."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from hf_linattn.errors import ConfigError, LinAttnError, UnknownFieldError
from hf_linattn.modules.base import LayerShape
from hf_linattn.modules.config import AttentionConfig
from hf_linattn.modules.defaults import DEFAULT_GROUPS, resolve
from hf_linattn.modules.registry import BUILTIN_KINDS, config_from_dict, get_kind, list_kinds

ABSURD: list[Any] = [2**20 + 1, 2**40, 2**63, 2**64, 10**400]  # beyond what a tensor, or an int64, may hold
NOT_COUNTS: list[Any] = [0, -1, 2.0, "8", True, None, math.nan, math.inf, -(2**70), *ABSURD]
NOT_BOOLS: list[Any] = [0, 1, "true", None]
NOT_NUMBERS = [v for v in NOT_COUNTS if v is not None]  # where None is the default
NOT_SIZES = [v for v in NOT_COUNTS if v != 0 or isinstance(v, bool)]  # 0 is a size
PROPOSALS: dict[str, list[Any]] = {  # LARA and EVA
    "proposal_map": ["learned", 1],
    "sample_noise": [0, 1, "true"],
    "noise_scale": ["official", 1],
    "conventions": ["official", None, 1],
}
BAD: dict[str, dict[str, list[Any]]] = {
    "": {  # fields of every kind
        "window_size": [v for v in NOT_SIZES if v is not None],
        "num_global_tokens": [v for v in NOT_SIZES if v is not None],
        "overlap_window": NOT_BOOLS,
        "slot_dropout": [1.0, 1, -0.1, math.nan, math.inf, 10**400, "0.1", None, True],
        "exact_below": NOT_SIZES,
        "seed": [-1, 2**63, 2**70, math.nan, 1.0, None, "0", True],
    },
    "favor": {
        "num_features": NOT_NUMBERS,
        "chunk_size": [*NOT_NUMBERS, 3, 96, 8192],
        "orthogonal": NOT_BOOLS,
        "shared_projection": NOT_BOOLS,
        "redraw_interval": [0, -1, 2.0, "8", True, math.nan, 2**63],
        "num_heavy_keys": NOT_SIZES,
        "learned": NOT_BOOLS,
        "value_convolution": [True, *NOT_BOOLS],  # without learned=True
        "normalizer": ["kernel", "slot", "", None, 1],
    },
    "favor_plus": {
        "regularized": NOT_BOOLS,
        "kernel": ["relus", "RELU", "", None, 1, ["relu"]],
        "kernel_epsilon": [-1e-3, math.inf, math.nan, 1e300, 10**400, "0.1", None, True],
    },
    "favor_sharp": {
        "variant": ["favor", "SADERF", "", None, 1, ["saderf"]],
        "centring": NOT_BOOLS,
        "statistics": ["batch", "", 1, True],
    },
    "lara": {
        "num_landmarks": NOT_NUMBERS,
        "proposal_source": ["data", 1, True],
        "weighting": ["bias", "", 1],
        "alpha_coeff": [-1.0, math.inf, math.nan, 1e300, 10**400, "1", None, True],
        "mixing": ["value", 1],
        "map_stage": ["sum", 1],
        "samples_per_landmark": NOT_NUMBERS,
        "antithetic": [0, 1, "true"],
        "num_heavy_keys": NOT_SIZES,
        "learned": NOT_BOOLS,
        "value_convolution": [True, *NOT_BOOLS],  # without learned=True
        **PROPOSALS,
    },
    "eva": {
        "window_size": [0],
        "num_chunks": NOT_NUMBERS,
        "chunk_size": NOT_NUMBERS,
        "max_chunks": NOT_NUMBERS,
        "proposals": ["queries", 1],
        "weighting": ["mass", ""],
        "chunking": ["corrected", 1],
        "relative_position": ["rope", None, 1],
        "relative_index": ["official", 1],
        "relative_dims": [0, 3, 2**64, "2"],
        "learned": NOT_BOOLS,
        "value_convolution": [True, *NOT_BOOLS],  # without learned=True
        **PROPOSALS,
    },
}


def bad_values() -> list[tuple[str, str, Any]]:
    rows = []
    for kind in list_kinds():
        for group, fields in BAD.items():
            if group in ("", kind) or kind.startswith(f"{group}_"):
                rows += [(kind, field, value) for field, values in fields.items() for value in values]
    return rows


def config_of(kind: str, **fields: Any) -> AttentionConfig:
    return get_kind(kind).config_cls(**fields)


@pytest.mark.parametrize(("kind", "field", "value"), bad_values())
def test_values_that_cannot_work_are_refused(kind: str, field: str, value: Any) -> None:
    name = get_kind(kind).config_cls.__name__
    with pytest.raises(ConfigError, match=rf"^{name}\.{field} must be ") as error:
        config_of(kind, **{field: value})
    assert repr(value) in str(error.value)
    assert isinstance(error.value, ValueError)
    with pytest.raises(ConfigError):
        config_of(kind).replace(**{field: value})


@pytest.mark.parametrize("kind", BUILTIN_KINDS)
def test_every_field_is_covered_above(kind: str) -> None:
    covered = {field for k, field, _ in bad_values() if k == kind}
    assert covered == {f.name for f in dataclasses.fields(get_kind(kind).config_cls)}


@pytest.mark.parametrize("kind", list_kinds())
def test_the_edges_of_every_range_are_allowed(kind: str) -> None:
    config = config_of(kind, window_size=1, num_global_tokens=0, slot_dropout=0, seed=2**63 - 1)
    assert config.seed == 2**63 - 1
    config_of(kind, window_size=None, slot_dropout=0.999)
    if kind != "eva":
        config_of(kind, window_size=0)
    if kind.startswith("favor"):
        config_of(kind, num_features=1, chunk_size=1)
        config_of(kind, chunk_size=4096)


def test_settings_that_are_too_large_together() -> None:
    with pytest.raises(ConfigError, match=r"num_landmarks \* samples_per_landmark <= 1048576; got 2048"):
        config_of("lara", num_landmarks=1024, samples_per_landmark=2048)
    large = resolve(config_of("eva", window_size=2**20, relative_position="table"), "bert")
    with pytest.raises(ConfigError, match="more than 1048576 entries per head; got window_size=1048576"):
        get_kind("eva").module_cls.check(large, LayerShape(num_heads=2, head_dim=4))


def test_regularised_needs_orthogonal() -> None:
    config_of("favor_plus", regularized=True)
    with pytest.raises(ConfigError, match="regularized must be False when orthogonal=False"):
        config_of("favor_plus", regularized=True, orthogonal=False)


def test_near_misses_of_choices_are_named() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'saderf'"):
        config_of("favor_sharp", variant="SADERF")
    with pytest.raises(ConfigError, match="Did you mean 'balance'"):
        config_of("lara", weighting="balanced")


@pytest.mark.parametrize("kind", list_kinds())
@pytest.mark.parametrize(("typo", "meant"), [("windowsize", "window_size"), ("num_global_token", "num_global_tokens")])
def test_unknown_fields(kind: str, typo: str, meant: str) -> None:
    config = config_of(kind)
    for make in (
        lambda: config_of(kind, **{typo: 1}),
        lambda: type(config).from_dict({**config.to_dict(), typo: 1}),
        lambda: config_from_dict({**config.to_dict(), typo: 1}),
        lambda: config.replace(**{typo: 1}),
    ):
        with pytest.raises(UnknownFieldError, match=rf"has no field '{typo}'.*Did you mean '{meant}'") as error:
            make()
        assert isinstance(error.value, TypeError)
        assert isinstance(error.value, ValueError)
        assert isinstance(error.value, LinAttnError)


def test_fields_of_one_kind_are_unknown_to_another() -> None:
    with pytest.raises(UnknownFieldError, match="num_landmarks"):
        config_of("eva", num_landmarks=4)


@pytest.mark.parametrize("kind", list_kinds())
def test_settings_are_frozen_named_and_hashable(kind: str) -> None:
    config = config_of(kind, seed=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 4  # type: ignore[misc]
    with pytest.raises(TypeError):
        type(config)(32)
    assert hash(config) == hash(config_of(kind, seed=3))
    assert config != config_of(kind, seed=4)


@pytest.mark.parametrize("kind", list_kinds())
@pytest.mark.parametrize("family", sorted(DEFAULT_GROUPS))
def test_dictionary_form_round_trips(kind: str, family: str) -> None:
    for config in (config_of(kind), resolve(config_of(kind), family), config_of(kind, seed=5, slot_dropout=0.25)):
        stored = json.loads(json.dumps(config.to_dict()))
        assert stored["kind"] == kind
        assert config_from_dict(stored) == config
        assert type(config).from_dict(stored) == config
        assert config_from_dict({"kind": kind}) == config_of(kind)


def test_dictionaries_of_no_or_another_kind_are_refused() -> None:
    with pytest.raises(ConfigError, match="need the key 'kind'"):
        config_from_dict({"window_size": 4})
    with pytest.raises(ConfigError, match="Did you mean 'favor_plus'"):
        config_from_dict({"kind": "favour-plus"})
    with pytest.raises(ConfigError, match="'lara'"):
        type(config_of("favor_plus")).from_dict({"kind": "lara"})


@pytest.mark.parametrize("kind", list_kinds())
def test_replace_and_fill(kind: str) -> None:
    config = config_of(kind, num_global_tokens=2)
    assert config.replace(seed=9).seed == 9
    assert config.seed == 0
    filled = config.filled({"window_size": 7, "num_global_tokens": 5, "unknown": 1})
    assert filled.window_size == 7  # was None
    assert filled.num_global_tokens == 2  # was set
    assert config_of(kind, window_size=1).filled({"window_size": 7}).window_size == 1
    if kind != "eva":
        assert config_of(kind, window_size=0).filled({"window_size": 7}).window_size == 0  # 0 is a value


@pytest.mark.parametrize("kind", list_kinds())
@pytest.mark.parametrize("family", sorted(DEFAULT_GROUPS))
def test_family_defaults_leave_nothing_open(kind: str, family: str) -> None:
    config = resolve(config_of(kind), family)
    # `None` says "never", "what is fast for the shape" and "all".
    open_fields = {name for name, value in config.to_dict().items() if value is None}
    assert open_fields <= {"redraw_interval", "chunk_size", "max_chunks"}
    assert resolve(config, family) == config


def test_family_defaults() -> None:
    assert resolve(config_of("eva"), "bert").proposals == "sum"
    assert resolve(config_of("eva"), "gpt2").proposals == "key"
    assert resolve(config_of("lara"), "vit").num_global_tokens == 1
    assert resolve(config_of("lara"), "bert").num_global_tokens == 0
    with pytest.raises(ConfigError, match="Did you mean 'gpt2'"):
        resolve(config_of("eva"), "gpt-2")
