"""ONNX has no operator for linear attention: a sentence says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import GPT2, KINDS, VIT, converted, native, supported
from roads import CLASSIFIER, padded, road

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
REFUSED = r"torch\.onnx\.export of a model with linear attention \('\w+'\) is not supported"


@pytest.mark.parametrize("mode", [native, converted])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", [CLASSIFIER, GPT2, VIT], ids=lambda case: case.name)
def test_torchscript_exporter(case: Any, kind: str, mode: Any, tmp_path: Path) -> None:
    if not supported(kind, case, native=mode is native):
        return
    pytest.importorskip("onnx")
    inputs = tuple(case.inputs(2).values())
    model = mode(case, kind)
    with pytest.raises(NotImplementedError, match=REFUSED):
        torch.onnx.export(model, inputs, str(tmp_path / "model.onnx"), dynamo=False)
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize(
    ("case", "kind", "mode"),
    [
        pytest.param(CLASSIFIER, "eva", native),
        pytest.param(GPT2, "favor_plus", converted, marks=pytest.mark.slow),
        pytest.param(VIT, "lara", native, marks=pytest.mark.slow),
    ],
)
def test_exporter_of_today(case: Any, kind: str, mode: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    inputs = padded() if case is not VIT else VIT.inputs(2)
    with pytest.raises(Exception, match=REFUSED):
        torch.onnx.export(road(case, kind, mode), kwargs=inputs, f=str(tmp_path / "model.onnx"), dynamo=True)
    assert not (tmp_path / "model.onnx").exists()
