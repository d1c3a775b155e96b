"""The page docs/model_types.md from the results of the sweep."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

KINDS = {"favor_plus": "FAVOR+", "favor_sharp": "FAVOR#", "lara": "LARA", "eva": "EVA"}

# What stands in a refusal -> why, in a few words. The first that fits counts.
REASONS = (
    (r"computes softmax attention itself \((\w+)\)", "computes attention itself ({0})"),
    (r"chooses among its own attention classes", "attention classes of its own, chosen by name"),
    (r"no attention layer that asks", "no attention layers"),
    (r"uses sliding-window attention", "sliding-window attention"),
    (r"uses chunked attention", "chunked attention"),
    (r"uses attention in both directions", "both directions within blocks of tokens"),
    (r"adds one of its own to it \(([\w, ]+)\)", "a pattern of its own ({0})"),
    (r"A bias on attention logits", "bias on attention logits"),
    (r"soft cap", "capped attention logits"),
    (r"[Ss]inks", "attention sinks"),
    (r"attention_mask must be 2-D", "makes its own mask over pairs of tokens, or a bias"),
    (r"does not say whether it is causal", "does not say whether it is causal"),
    (r"does not say whether it attends to its own", "does not say whether it is cross-attention"),
    (r"works with statistics of other data", "causal: needs a calibrated, converted model"),
    (r"cannot do cross-attention", "cross-attention"),
    (r"works on the attention mask itself", "computes attention itself"),
    (r"was given (\w+)=", "passes {0} to its attention function"),
    (r"The model made a (\w+) attention mask, but \w+ computes (\w+)", "makes a {0} mask for {1} attention"),
    (r"does not let the attention of", "from_config and from_pretrained only"),
    (r"does not hand a name on", "set_attn_implementation only"),
    (r"position_ids must", "position_ids of its own"),
    (r"Packed sequences", "packed sequences"),
)

HEAD = """# Model types

    python scripts/architecture_sweep.py            # some six minutes on one core; --resume goes on where a run ended

builds every model type of Transformers {version} tiny, with random weights, gives it every kind's name without
conversion (`attn_implementation=kind` in `from_config` and `from_pretrained`, `model.set_attn_implementation(kind)`),
and writes this page.

* **Computes**: with one window over all tokens the output is that of softmax to {tolerance:g}, without a window it is
  another, and as many layers call the kind as attend at all. In cross-attention, which has no window, the first is
  shown with the kind's mathematics replaced by softmax. Where one of the three ways alone reaches a model, the others
  are refused and name it.
* **Refused**: an error of this library that says why and what to do. What it advises was followed, step by step, and
  led to a model that runs.

Nothing else may happen: a name that is taken and ignored, another result, or another error fails the sweep. Modules
that attend by themselves whatever the name, such as pooling heads, are in the last column.

{summary}
"""


def reason(message: str) -> str:
    for pattern, words in REASONS:
        found = re.search(pattern, message)
        if found:
            return words.format(*found.groups())
    return message.partition(": ")[2][:100].replace("|", "/")


def verdicts(row: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return list(row["kinds"].get(kind, {}).values())


def works(row: dict[str, Any]) -> list[str]:
    return [
        kind
        for kind in KINDS
        if (found := verdicts(row, kind))
        and all(v["verdict"] == "works" or points_to_another_road(v) for v in found)
        and any(v["verdict"] == "works" for v in found)
    ]


def points_to_another_road(verdict: dict[str, Any]) -> bool:
    """Whether a refusal says on which other road the name can be given."""
    return verdict["verdict"] == "refused" and bool(_ANOTHER_ROAD.search(verdict["why"]))


_ANOTHER_ROAD = re.compile("Transformers does not (let the attention of|hand a name on)")


def faults(results: dict[str, Any]) -> list[str]:
    """Everything that may not be: names that are ignored, wrong results, raw errors, advice that does not work."""
    found = []
    for name, row in results.items():
        if "broken" in row:
            found.append(f"{name}: {row['broken']}")
        for kind, roads in row.get("kinds", {}).items():
            found += [f"{name}: {kind}, {road}: {v['why']}" for road, v in roads.items() if v["verdict"] == "fault"]
            if len({v["verdict"] for v in roads.values() if not points_to_another_road(v)}) > 1:
                found.append(f"{name}: {kind}: { ({road: v['verdict'] for road, v in roads.items()}) }")
        found += [f"{name}: {message}: {wrong}" for message, wrong in row.get("advice", {}).items()]
        found += [f"{name}: convert to {kind}: {message}" for kind, message in row.get("convert", {}).items()]
    return found


def group(row: dict[str, Any]) -> str:
    """ "computes", "refused", "stock", "taken" (and not run), "fault" or "not built"."""
    if faults({"": row}):
        return "fault"
    if not row["built"]:
        return "not built"
    found = {v["verdict"] for roads in row["kinds"].values() for v in roads.values()}
    for verdict, name in (("fault", "fault"), ("works", "computes"), ("accepted", "taken"), ("refused", "refused")):
        if verdict in found:
            return name
    return "stock"


def refusals(row: dict[str, Any]) -> str:
    """Reasons, each with the kinds it is about where it is not about all."""
    by_reason: dict[str, list[str]] = {}
    for kind in KINDS:
        for verdict in verdicts(row, kind):
            if verdict["verdict"] in ("refused", "stock"):
                kinds = by_reason.setdefault(reason(verdict["why"]), [])
                kinds += [KINDS[kind]] if KINDS[kind] not in kinds else []
    return "; ".join(
        why if len(kinds) == len(KINDS) else f"{', '.join(kinds)}: {why}" for why, kinds in by_reason.items()
    )


def cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def render(found: dict[str, Any], *, tolerance: float) -> str:
    """The page from a results file."""
    results, version = found["types"], found["transformers"]
    rows: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for name, row in sorted(results.items()):
        rows.setdefault(group(row), []).append((name, row))
    counts = Counter({name: len(found) for name, found in rows.items()})
    titles = {
        "computes": "Computes with at least one kind",
        "refused": "Refused with a reason",
        "taken": "Not run: the layers ask for the kind's function, but no input for the tiny model was found",
        "stock": "Refused by Transformers, in its words",
        "fault": "Faults",
        "not built": "Not built tiny",
    }
    summary = "\n".join(f"- {title}: {counts[name]} types" for name, title in titles.items() if counts[name])
    if left := found["known"] - len(results):
        summary += f"\n- Not tried yet: {left} types (`--resume` goes on)"
    lines = [HEAD.format(version=version, tolerance=tolerance, summary=summary)]
    for name, title in titles.items():
        if name not in rows:
            continue
        lines += ["", f"## {title}", ""]
        if name == "computes":
            lines += [
                "| model type | class | kinds | refused | softmax of its own beside |",
                "| --- | --- | --- | --- | --- |",
            ]
            for model_type, row in rows[name]:
                able = works(row)
                kinds = "all" if len(able) == len(KINDS) else ", ".join(KINDS[kind] for kind in able)
                own = ", ".join(row["own"])
                lines.append(cell_row(f"`{model_type}`", row["class"], kinds, refusals(row), own))
        elif name == "not built":
            lines += ["| model type | why |", "| --- | --- |"]
            lines += [cell_row(f"`{model_type}`", row["why"][:160]) for model_type, row in rows[name]]
        elif name == "fault":
            lines += [f"- {cell(fault)}" for fault in faults(dict(rows[name]))]
        elif name == "taken":
            lines += ["| model type | class | what building an input ended in |", "| --- | --- | --- |"]
            lines += [cell_row(f"`{t}`", row["class"], row["stock"][:120]) for t, row in rows[name]]
        else:
            lines += ["| model type | class | why |", "| --- | --- | --- |"]
            lines += [cell_row(f"`{t}`", row["class"], refusals(row)) for t, row in rows[name]]
    return "\n".join(lines) + "\n"


def cell_row(*cells: str) -> str:
    return "| " + " | ".join(map(cell, cells)) + " |"
