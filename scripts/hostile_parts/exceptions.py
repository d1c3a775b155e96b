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


EXCEPTIONS: tuple[Exception_, ...] = ()


def reason_of(form: str, name: str, scale: float) -> str | None:
    """The number of the exception, as text; `None` if there is none."""
    for number, exception in enumerate(EXCEPTIONS, 1):
        listed = form.startswith(exception.forms) and any(part in form for part in exception.parts)
        if listed and name in exception.inputs and scale > exception.above:
            return str(number)
    return None
