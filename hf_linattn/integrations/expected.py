"""What this library expects of Transformers, in words, and the one sentence for what has changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers

from ..errors import UnsupportedTransformersError

# The oldest and the newest release of Transformers in the table of docs/compatibility.md.
TESTED_RELEASES = ("5.10.4", "5.24.0")


@dataclass(frozen=True)
class Seam:
    """One thing that this library needs Transformers to do. Its probe tries it out: `None`, or what it found.

    `when` the canary asks: "always", at the first touch of a model; "family", at that of a BERT, GPT-2 or ViT, which
    the probe is told; "trainer", when the callback is made; "use", never: the code that uses it raises.
    """

    name: str
    expects: str
    when: str
    probe: Any = None


# Those that only using them can tell. `expects` adds the others.
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
SEAMS = {name: Seam(name, expected, "use") for name, expected in _USE.items()}


def expects(what: str, when: str = "always") -> Callable[[Any], Any]:
    """Declare a function as the probe of the seam that it is named after."""

    def declare(probe: Any) -> Any:
        name = probe.__name__.replace("_", " ")
        SEAMS[name] = Seam(name, what, when, probe)
        return probe

    return declare


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
