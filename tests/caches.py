"""Caches as arguments and results of a model, under the names that the installed Transformers has for them."""

from __future__ import annotations

import functools
from typing import Any

from transformers import Cache, GPT2LMHeadModel

from hf_linattn.integrations.seams import cache_argument


@functools.cache
def cache_keyword() -> str:
    """Name of a decoder's argument for a cache: "past_key_values" up to 5.23, "cache" since."""
    return cache_argument(GPT2LMHeadModel)


def given_cache(cache: Any) -> dict[str, Any]:
    """Keyword arguments that give a cache to a model or to `generate`."""
    return {cache_keyword(): cache}


def cache_of(output: Any) -> Any:
    """The cache in the output of a model or of `generate`."""
    return next(value for value in output.values() if isinstance(value, Cache))
