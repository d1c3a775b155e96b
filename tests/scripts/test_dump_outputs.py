"""`scripts/dump_outputs.py` finds what has changed, and takes what has not for equal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dump_outputs
from dump_parts.compare import compare
from dump_parts.record import Record, read_record


def run(*arguments: object) -> int:
    return dump_outputs.main([str(argument) for argument in arguments])


def test_two_dumps_of_one_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, only = tmp_path / "before.safetensors", ("--only", "softmax/(plain|causal)/left")
    assert run("--out", path, *only) == 0
    assert set(read_record(path).tensors) == {
        f"softmax/{case}/left/{what}"
        for case in ("plain", "causal")
        for what in ("inference", "output", "gradient query", "gradient key", "gradient value")
    }
    assert run("--compare", path, *only) == 0
    assert "10 tensors and 0 texts before: 0 faults" in capsys.readouterr().out


def record(**changes: object) -> Record:
    made = Record()
    made.case(
        "group",
        "case",
        lambda: {
            "output": torch.ones(3),
            "gradient a": torch.tensor([1e-9]),
            "gradient b": torch.ones(2),
            "words": "x",
            **changes,
        },
    )
    return made


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"output": torch.ones(3) + 1e-6}, ""),
        ({"output": torch.ones(3) + 1e-4}, "group/case/output: off by 1.0"),
        ({"output": torch.tensor([1.0, 1.0, float("nan")])}, "off by inf"),
        ({"output": torch.ones(3, dtype=torch.float64)}, "off by inf"),
        ({"output": torch.ones(1)}, "off by inf"),
        ({"gradient a": torch.tensor([-1e-9])}, ""),
        ({"gradient a": torch.tensor([1e-3])}, "gradient a: off by"),
        ({"gradient c": torch.ones(1)}, "gradient c: missing before"),
        ({"words": "y"}, "'x' has become 'y'"),
    ],
    ids=str,
)
def test_what_counts_as_a_change(changes: dict[str, object], fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(record(), record(**changes)) == (not fault)
    assert fault in capsys.readouterr().out


def test_an_error_is_a_result() -> None:
    made = Record()
    made.case("group", "case", lambda: {"output": torch.ones(3)[5]})
    assert made.texts["group/case/raises"].startswith("IndexError: index 5")
