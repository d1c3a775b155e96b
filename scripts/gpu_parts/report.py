"""The results as tables in Markdown."""

from __future__ import annotations

from typing import Any

from hf_linattn.bench.report import LEGEND, markdown_panels, markdown_table
from hf_linattn.bench.results import Row

Content = dict[str, Any]


def markdown(content: Content) -> str:
    """Everything that a run found, for `docs/performance.md`."""
    hardware, versions = content["environment"]["hardware"], content["environment"]["versions"]
    place = hardware.get("gpu") or hardware["cpu"]
    software = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "transformers", "python"))
    parts = []
    if content["is_rehearsal"]:
        parts.append(
            "# Rehearsal of the GPU check on a CPU\n\n**No figure here is from a GPU.** Sizes are tiny and kernels run"
            " in Triton's interpreter: this shows that the parts run, and nothing about speed."
        )
    else:
        parts.append(f"# GPU check: {place}")
    parts.append(f"{place}; {software}; {content['date']}. Made by `{content['command']}`.")
    if not content["is_complete"]:
        parts.append("The run was cut short.")
    parts.append(_outcomes(content["parts"]))
    for part in content["parts"]:
        parts += _findings(part)
    return "\n\n".join(parts) + "\n"


def _outcomes(parts: list[Content]) -> str:
    lines = [
        [part["name"], part["status"], f"{part.get('seconds', 0):.0f} s", _escape(part.get("reason", ""))]
        for part in parts
    ]
    return markdown_table((["part", "result", "time", "reason"], lines))


def _escape(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())[:200]


def _findings(part: Content) -> list[str]:
    findings = part.get("findings", [])
    made: list[str] = []
    rows = [Row.from_dict(f["row"]) for f in findings if "row" in f]
    if rows:
        made.append(LEGEND if part["name"] == "attention" else "")
        made += markdown_panels(rows, "###")
    for key, header, line in (
        ("kernel", ["kernel", "head_dim", "float32", "bfloat16", "float16"], None),
        ("compiled", ["what", "attention", "eager", "compiled", "difference or same tokens", "failure"], _compiled),
        ("trained", ["attention", "first loss", "last loss", "accuracy", "seconds", "failure"], _trained),
        ("profiled", ["call", "mode", "µs", "µs to issue", "µs on the device", "kernels"], _profiled),
        ("test", ["failed test", "message"], lambda f: [f["test"], _escape(f["message"][-1] if f["message"] else "")]),
    ):
        chosen = [f for f in findings if key in f]
        if chosen:
            lines = _errors(chosen) if line is None else [line(f) for f in chosen]
            made.append(markdown_table((header, lines)))
    made += [f"{f['tests']['passed']} tests passed, {f['tests']['failed']} failed." for f in findings if "tests" in f]
    made = [text for text in made if text]
    return [f"## {part['title'].capitalize()}", *made] if made else []


def _errors(findings: list[Content]) -> list[list[str]]:
    """One line for each kernel and head_dim: relative error by dtype, in brackets portable torch's."""
    table: dict[tuple[str, str], dict[str, str]] = {}
    for f in findings:
        if "error" in f:
            shown = f"{f['error']:.1e} ({f['torch_error']:.1e})" + (" **failed**" if f.get("failed") else "")
        else:
            shown = f"**failed**: {_escape(f.get('reason', ''))}" if f.get("failed") else f.get("reason", "")
        name, *rest = f["kernel"].split("/")  # a process that ended without a word knows no more
        dtype, dim = f.get("dtype", "".join(rest[:1])), f.get("head_dim", "".join(rest[1:]))
        table.setdefault((name, str(dim)), {})[dtype] = shown
    return [
        [name, dim, *(found.get(dtype, "") for dtype in ("float32", "bfloat16", "float16"))]
        for (name, dim), found in sorted(table.items(), key=lambda entry: (entry[0][0], entry[0][1].zfill(4)))
    ]


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.2f} ms"


def _compiled(f: Content) -> list[str]:
    number = f.get("difference", f.get("same_tokens"))
    return [
        f["compiled"],
        f["attention"],
        _milliseconds(f.get("eager_seconds")),
        _milliseconds(f.get("compiled_seconds")),
        "" if number is None else f"{number:.2g}",
        _escape(f.get("reason", "")),
    ]


def _trained(f: Content) -> list[str]:
    losses = f.get("losses", [])
    return [
        f["trained"],
        f"{losses[0]:.3f}" if losses else "",
        f"{losses[-1]:.3f}" if losses else "",
        f"{f['accuracy']:.3f}" if "accuracy" in f else "",
        f"{f['train_seconds']:.1f}" if "train_seconds" in f else "",
        _escape(f.get("reason", "")),
    ]


def _profiled(f: Content) -> list[str]:
    if "call_us" not in f:
        return [f["profiled"], f["mode"], _escape(f.get("reason", "")), "", "", ""]
    numbers = (f["call_us"], f["issue_us"], f["device_us"], f["kernels"])
    return [f["profiled"], f["mode"], *(f"{number:.0f}" for number in numbers)]
