"""The default of every setting that depends on the kind and the model family, in one place.

A field that is `None` in a config takes its value from here when a model is converted (the saved config is explicit)
or, in native mode, at every call. `docs/decisions.md` says how the values were chosen.
"""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError, did_you_mean
from .config import AttentionConfig

# Families beyond the three that can be converted share the defaults of the closest one.
FAMILIES = {
    "bert": "encoder",
    "gpt2": "decoder",
    "vit": "vision",
    "encoder": "encoder",
    "decoder": "decoder",
    "vision": "vision",
}

_BASE: dict[str, dict[str, Any]] = {
    "encoder": {"window_size": 32, "num_global_tokens": 0},
    "decoder": {"window_size": 32, "num_global_tokens": 0},
    # In 2-D the window is the side of a square of patches: 4 x 4 = 16 of them.
    "vision": {"window_size": 4, "num_global_tokens": 1},
}

# Where a layer finds what it needs to know of its inputs: a causal one must not look at its own sequence.
_BY_GROUP: dict[tuple[str, str], dict[str, Any]] = {
    ("favor_sharp", "encoder"): {"statistics": "row"},
    ("favor_sharp", "vision"): {"statistics": "row"},
    ("favor_sharp", "decoder"): {"statistics": "calibrated"},
    ("lara", "encoder"): {"proposal_source": "landmarks"},
    ("lara", "vision"): {"proposal_source": "landmarks"},
    ("lara", "decoder"): {"proposal_source": "calibrated"},
    ("eva", "encoder"): {"relative_dims": 1},
    ("eva", "vision"): {"relative_dims": 2},
    ("eva", "decoder"): {"relative_dims": 1},
}

# Samples of fixed proposals are drawn once, and several of them are needed; those of landmarks only with noise.
_LARA_SAMPLES: dict[str, dict[str, Any]] = {
    "landmarks": {"samples_per_landmark": 1, "antithetic": False},
    "calibrated": {"samples_per_landmark": 2, "antithetic": True},
}

CONVENTIONS = ("corrected", "published")

# What `conventions` bundles: the fields of LARA and EVA in which the published code differs from its own mathematics,
# or from what suits a pretrained model. Each can be set on its own.
_CONVENTIONS: dict[tuple[str, str], dict[str, Any]] = {
    ("lara", "corrected"): {
        "proposal_map": "residual",
        "map_stage": "mean",
        "mixing": "none",
        "sample_noise": False,
        "noise_scale": "corrected",
        "weighting": "balance",
    },
    ("lara", "published"): {
        "proposal_map": "linear_norm",
        "map_stage": "tokens",
        "mixing": "none",
        "sample_noise": True,
        "noise_scale": "published",
        "weighting": "optimal",
        "window_size": 0,
    },
    ("eva", "corrected"): {
        "proposal_map": "residual",
        "sample_noise": False,
        "noise_scale": "corrected",
        "chunking": "exclusive",
        "weighting": "size",
        "proposals": "sum",
        "relative_index": "corrected",
    },
    ("eva", "published"): {
        "proposal_map": "linear_norm",
        "sample_noise": True,
        "noise_scale": "published",
        "chunking": "published",
        "weighting": "none",
        "proposals": "mean",
        "relative_index": "published",
    },
}

_EXCEPTIONS: dict[tuple[str, str, str], dict[str, Any]] = {
    # A decoder's cache holds no queries, so its proposals come from the keys alone.
    ("eva", "corrected", "decoder"): {"proposals": "key"},
    ("eva", "published", "decoder"): {"proposals": "sum"},
    ("lara", "published", "vision"): {"map_stage": "mean"},
}


def family_defaults(kind: str, family: str, conventions: str = "corrected") -> dict[str, Any]:
    """Defaults of one kind in one model family. Raises `ConfigError` for an unknown family."""
    if family not in FAMILIES:
        raise ConfigError(
            f"Unknown model family {family!r}; families: {sorted(FAMILIES)}.{did_you_mean(family, FAMILIES)}"
        )
    group = FAMILIES[family]
    values = {
        **_BASE[group],
        **_BY_GROUP.get((kind, group), {}),
        **_CONVENTIONS.get((kind, conventions), {}),
        **_EXCEPTIONS.get((kind, conventions, group), {}),
    }
    return {**values, **_LARA_SAMPLES[values["proposal_source"]]} if kind == "lara" else values


def resolve(config: AttentionConfig, family: str) -> AttentionConfig:
    """A copy of `config` with every `None` field filled in for the family."""
    values = family_defaults(config.kind, family, getattr(config, "conventions", "corrected"))
    source = getattr(config, "proposal_source", None)
    return config.filled({**values, **_LARA_SAMPLES[source]} if source else values)
