"""What cannot keep the bound, from which scale on, and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Exception_:
    """Forms whose name begins with one of `forms` and holds one of `parts`, on `inputs`, above scale `above`."""

    reason: str
    forms: tuple[str, ...]
    parts: tuple[str, ...]
    inputs: tuple[str, ...]
    above: float


_COINCIDING = ("equal keys", "equal tokens", "keys along queries", "queries and keys", "shifted queries and keys")

EXCEPTIONS: tuple[Exception_, ...] = (
    Exception_(
        "Groups of keys (window, slots, chunks, global and heavy tokens, stretches of a causal row) meet under "
        "one softmax by logits from different products, or by their log masses. Each is rounded on its own: by "
        "6e-8 of itself, so that shares are off by as much. Softmax and the plain formula round the logits of "
        "equal keys alike, and their errors cancel.",
        ("FAVOR", "LARA", "EVA", "generalised"),
        ("window", "global", "heavy", "EVA", "causal"),
        _COINCIDING,
        1.0,
    ),
    Exception_(
        "LARA's log-weights hold the squared lengths of queries, keys and proposals, which nearly cancel: at x1e3"
        " they are 1e6 and rounded by 0.1, where the logits of softmax are 1e3.",
        ("LARA",),
        ("",),
        ("all queries", "all keys", "shifted keys", *_COINCIDING),
        1.0,
    ),
    Exception_(
        "EVA takes the keys of a chunk relative to their mean, which costs nothing where they have much in "
        "common; a key a hundred times as long as the others moves that mean, and the distances of the others are"
        " rounded with it.",
        ("EVA",),
        ("",),
        ("one key",),
        10.0,
    ),
    Exception_(
        "The summary of an EVA chunk is a softmax of squared distances: 1e6 at x1e3, rounded by 0.1.",
        ("EVA",),
        ("",),
        ("all queries", "all keys"),
        10.0,
    ),
    Exception_(
        "FAVOR#'s constants are taken from the row in float32, and all log-features change with them: within "
        "three times the error of the plain formula.",
        ("FAVOR#",),
        ("no window",),
        ("all keys", "one query"),
        100.0,
    ),
    Exception_(
        "Values a thousand times as large as the others: within four times the error of the plain formula.",
        ("LARA",),
        ("heavy",),
        ("one value",),
        100.0,
    ),
)


def reason_of(form: str, name: str, scale: float) -> str | None:
    """The number of the exception, as text; `None` if there is none."""
    for number, exception in enumerate(EXCEPTIONS, 1):
        listed = form.startswith(exception.forms) and any(part in form for part in exception.parts)
        if listed and name in exception.inputs and scale > exception.above:
            return str(number)
    return None
