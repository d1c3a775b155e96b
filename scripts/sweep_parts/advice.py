"""Whether what an error advises can be done: its words are followed, and those of the error that comes next."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

_NAME = re.compile(r"attn_implementation=('\w+'|\{[^}]*\})")
_SETTINGS = r"linear_attention = (\{[^}]*\}) in the '([^']*)' config"
_KINDS = re.compile(r"Use one of (\[[^\]]*\])(?: with " + _SETTINGS + ")?")
_SET = re.compile("Set " + _SETTINGS)
_CHANGE = re.compile(r"Set (\w+)=(None|\['full_attention'\] \* \d+) in the '([^']*)' config")
# Advice about the call, or about a field of the settings, rather than about the model.
_CALL = re.compile(
    r"Pass |pass the|Give one|Drop |Leave out|Set `is_causal`|set_attn_implementation\(|Load it without"
)
# The name that was asked for, which an error repeats before it says what to do.
_ASKED = re.compile(r"so attn_implementation='\w+'|under '\w+'")

Name = str | dict[str, str]
# From a config and a name for its attention: what a model of them raises when it is made and run.
TryOut = Callable[[Any, Name], str | None]


def steps(message: str, config: Any, name: Name, parts: Callable[[Any], list[Any]]) -> Iterator[tuple[str, Any, Name]]:
    """What an error advises: the words, and the config and the name that follow from them."""

    def edited(model_type: str, field: str, value: Any) -> Any:
        changed = copy.deepcopy(config)
        for part in parts(changed):
            if part.model_type == model_type:
                setattr(part, field, value)
        return changed

    def called(kind: str) -> Name:
        return dict.fromkeys(name, kind) if isinstance(name, dict) else kind

    rest = _ASKED.sub("", message)
    kinds, settings, change = _KINDS.search(rest), _SET.search(rest), _CHANGE.search(rest)
    if kinds:
        for kind in ast.literal_eval(kinds[1]):
            new = config
            if kinds[2]:
                new = edited(kinds[3], "linear_attention", {"kind": kind, **ast.literal_eval(kinds[2])})
            yield f"{kind!r}", new, called(kind)
    if settings:
        yield settings[0], edited(settings[2], "linear_attention", ast.literal_eval(settings[1])), name
    if change:
        value = None if change[2] == "None" else ["full_attention"] * int(change[2].rsplit(" ", 1)[1])
        yield change[0], edited(change[3], change[1], value), name
    for found in _NAME.findall(rest):
        yield f"attn_implementation={found}", config, ast.literal_eval(found)


def failures(
    message: str, config: Any, name: Name, parts: Callable[[Any], list[Any]], try_out: TryOut, depth: int = 4
) -> list[str]:
    """Pieces of advice in an error that do not lead to a model that runs, each with what happens instead."""
    try:
        taken = list(steps(message, config, name, parts))
    except Exception as error:  # a field that does not take the value
        return [" ".join(f"{type(error).__name__}: {error}".split())[:300]]
    if not taken:
        return [] if _CALL.search(message) else ["no advice"]
    found = []
    for words, new, called in taken:
        wrong = try_out(copy.deepcopy(new), called)
        # An error of this library about the model says what to do next, one about a mask that the model made too.
        if wrong is not None and not (wrong.startswith(("UnsupportedError", "InputError")) and depth):
            found.append(f"{words}: {wrong}")
        elif wrong is not None:
            if wrong == message:
                found.append(f"{words}: the same error again")
            else:
                found += [f"{words}: {then}" for then in failures(wrong, new, called, parts, try_out, depth - 1)]
    return found
