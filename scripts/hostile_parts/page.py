"""The results of a sweep: what is kept of them, and the tables of the page."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .exceptions import EXCEPTIONS, reason_of
from .inputs import INPUTS
from .measure import BOUNDED, SCALES

Case = dict[str, Any]


def summarised(cases: Iterable[Case]) -> list[Case]:
    """One entry for every setting, dtype and input, with the errors of the cases that are off."""
    entries: dict[tuple[str, str, str], Case] = {}
    for case in cases:
        key = (case["setting"], case["dtype"], case["input"])
        entry = entries.setdefault(key, {**dict(zip(("setting", "dtype", "input"), key, strict=True)), "kept": 0.0})
        entry["tried"] = case["scale"]
        if case["kept"] and not entry.get("off"):
            entry["kept"] = case["scale"]
        elif not case["kept"]:
            off = {name: [float(f"{x:.1e}") for x in case.get(name, ())] for name in ("ours", "softmax", "plain")}
            entry.setdefault("off", []).append({"scale": case["scale"], **off})
    return list(entries.values())


def unexplained(entries: list[Case]) -> list[str]:
    """What is off and not listed as an exception, and what is not finite."""
    found = []
    for entry in entries:
        for off in entry.get("off", []):
            name = f"{entry['setting']}, {entry['dtype']}, {entry['input']} x{off['scale']:g}"
            if not all(x < float("inf") for x in off["ours"]):
                found.append(f"{name}: not finite")
            elif reason_of(entry["setting"], entry["input"], off["scale"]) is None:
                found.append(f"{name}: {_errors(off['ours'])}, softmax {_errors(off['softmax'])}")
    return found


def _errors(pair: list[float]) -> str:
    return " / ".join(f"{x:.0e}" for x in pair) if pair else "-"


def _power(scale: float) -> str:
    return f"x{scale:.0e}".replace("e+0", "e") if scale else "-"


def _cell(entries: list[Case]) -> str:
    """Whether the bound holds for all inputs, or for how many it does not."""
    if not entries:
        return "-"
    names = [entry["input"] for entry in entries if entry.get("off")]
    if not names:
        return _power(BOUNDED)
    return f"{_power(BOUNDED)} but for {len(names)} of {len(entries)} inputs"


def render(entries: list[Case], dtypes: list[str]) -> str:
    """Both tables in Markdown."""
    settings = list(dict.fromkeys(entry["setting"] for entry in entries))
    lines = ["### Where the bound is kept", "", f"| form | {' | '.join(dtypes)} |", "|---" * (len(dtypes) + 1) + "|"]
    for setting in settings:
        rows = [[e for e in entries if e["setting"] == setting and e["dtype"] == dtype] for dtype in dtypes]
        lines.append(f"| {setting} | {' | '.join(map(_cell, rows))} |")
    lines += ["", "### Exceptions", ""]
    lines += ["| form | dtype | inputs | kept up to | worst at | error | softmax | plain | why |", "|---" * 9 + "|"]
    for entry in entries:
        if entry.get("off"):
            worst = max(entry["off"], key=lambda off: max(off["ours"]))
            why = reason_of(entry["setting"], entry["input"], worst["scale"]) or "**not listed**"
            errors = " | ".join(_errors(worst[name]) for name in ("ours", "softmax", "plain"))
            place = f"{entry['setting']} | {entry['dtype']} | {entry['input']} | {_power(entry['kept'])}"
            lines.append(f"| {place} | {_power(worst['scale'])} | {errors} | {why} |")
    lines += ["", *(f"{number}. {exception.reason}" for number, exception in enumerate(EXCEPTIONS, 1))]
    tried = f"{len(settings)} forms, {len(INPUTS)} inputs, scales {', '.join(map(_power, SCALES))}"
    return "\n".join([f"Tried: {tried}.", "", *lines])
