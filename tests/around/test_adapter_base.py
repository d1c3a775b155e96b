"""The model that an adapter names as its base: never a stock checkpoint, which would be softmax without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BERT, BY_NAME, GPT2, KINDS, VIT, ModelCase, ready, supported
from hub_server import run_with_hub
from test_peft import adapter, inputs_of, outputs, wrap

import hf_linattn
from hf_linattn.models import COUNTERPARTS

peft = pytest.importorskip("peft")
CASES = [BY_NAME["bert-classifier"], GPT2, VIT]
AUTO = {
    "bert-classifier": peft.AutoPeftModelForSequenceClassification,
    "bert-mlm": peft.AutoPeftModelForFeatureExtraction,
    "gpt2": peft.AutoPeftModelForCausalLM,
}


def stock(case: ModelCase, folder: Path) -> Any:
    """A stock model from a checkpoint."""
    case.build().save_pretrained(folder)
    return case.auto.from_pretrained(folder)


def base_of(folder: Path) -> Any:
    return json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]


def _convert(case: ModelCase, kind: str, folder: Path) -> Any:
    return hf_linattn.convert(stock(case, folder), case.settings(kind))


def _convert_copy(case: ModelCase, kind: str, folder: Path) -> Any:
    return hf_linattn.convert(stock(case, folder), case.settings(kind), copy=True)


def _load(case: ModelCase, kind: str, folder: Path) -> Any:
    stock(case, folder)
    return COUNTERPARTS[case.stock].from_pretrained(folder, linear_attention=case.settings(kind))


MATRIX = [(kind, case) for case in CASES for kind in KINDS if supported(kind, case)]


@pytest.mark.parametrize(("kind", "case"), MATRIX, ids=[f"{kind}-{case.name}" for kind, case in MATRIX])
@pytest.mark.parametrize("make", [_convert, _convert_copy, _load])
def test_adapter_of_an_unsaved_converted_model(kind: str, case: ModelCase, make: Any, tmp_path: Path) -> None:
    model = make(case, kind, tmp_path / "stock")
    wrap(model, adapter(case, "lora")).save_pretrained(tmp_path / "adapter")
    told = base_of(tmp_path / "adapter")
    assert told == f"({tmp_path / 'stock'} converted to {kind}: save it, and make adapters of the saved model)"
    if case.name in AUTO:
        with pytest.raises(OSError, match=r"converted to \w+: save it, and make adapters of the saved model\)"):
            AUTO[case.name].from_pretrained(tmp_path / "adapter")
    with pytest.raises(OSError, match="save it, and make adapters"):
        case.auto.from_pretrained(tmp_path / "adapter")
    # The model itself, made anew, takes it.
    again = ready(make(case, kind, tmp_path / "stock"))
    loaded = peft.PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert torch.equal(outputs(loaded, **inputs_of(case)), outputs(loaded, **inputs_of(case)))


@pytest.mark.parametrize(("kind", "case"), MATRIX, ids=[f"{kind}-{case.name}" for kind, case in MATRIX])
def test_an_adapter_of_a_saved_model_loads_it(kind: str, case: ModelCase, tmp_path: Path) -> None:
    ready(_convert(case, kind, tmp_path / "stock")).save_pretrained(tmp_path / "converted")
    wrapped = wrap(case.auto.from_pretrained(tmp_path / "converted"), adapter(case, "lora"))
    want = outputs(wrapped, **inputs_of(case))
    wrapped.save_pretrained(tmp_path / "adapter")
    assert base_of(tmp_path / "adapter") == str(tmp_path / "converted")
    if case.name in AUTO:
        loaded = AUTO[case.name].from_pretrained(tmp_path / "adapter")
    else:  # without a task PEFT imports the model's class, if it is allowed to
        with pytest.raises(ValueError, match="import_allowlist"):
            peft.AutoPeftModel.from_pretrained(tmp_path / "adapter")
        loaded = peft.AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=["hf_linattn"])
    torch.testing.assert_close(outputs(loaded, **inputs_of(case)), want, rtol=0, atol=1e-6)


def test_a_model_inside_a_head_has_no_stock_name_either(tmp_path: Path) -> None:
    model = _convert(BERT, "favor_plus", tmp_path / "stock")
    wrap(model.bert, adapter(BERT, "lora", task_type=None)).save_pretrained(tmp_path / "adapter")
    assert "save it" in base_of(tmp_path / "adapter")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_reverted_model_is_the_stock_one_again(case: ModelCase, tmp_path: Path) -> None:
    model = hf_linattn.revert(_convert(case, "favor_plus", tmp_path / "stock"))
    wrap(model, adapter(case, "lora")).save_pretrained(tmp_path / "adapter")
    assert base_of(tmp_path / "adapter") == str(tmp_path / "stock")


def test_the_lineage_stays_in_the_config(tmp_path: Path) -> None:
    """What cards are written from: ours, the Trainer's, PEFT's."""
    model = _convert(GPT2, "favor_plus", tmp_path / "stock")
    assert model.config.name_or_path == str(tmp_path / "stock")


@pytest.mark.hub
def test_an_adapter_of_a_pushed_model_loads_it(tmp_path: Path) -> None:
    run_with_hub(
        """
import sys; sys.path[:0] = ["tests", "tests/around"]
import torch
import hf_linattn
from cases import GPT2
from peft import AutoPeftModelForCausalLM
from test_peft import adapter, outputs, wrap
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

GPT2.build().push_to_hub("me/stock")
stock = AutoModelForCausalLM.from_pretrained("me/stock")
hf_linattn.convert(stock, GPT2.settings("favor_plus")).push_to_hub("me/linear")
wrapped = wrap(AutoModelForCausalLM.from_pretrained("me/linear"), adapter(GPT2, "lora"))
wrapped.push_to_hub("me/adapter")
loaded = AutoPeftModelForCausalLM.from_pretrained("me/adapter")
assert loaded.peft_config["default"].base_model_name_or_path == "me/linear"
assert (outputs(loaded, **GPT2.inputs()) - outputs(wrapped, **GPT2.inputs())).abs().max() < 1e-5

wrap(stock, adapter(GPT2, "lora")).push_to_hub("me/unsaved")
try:
    AutoPeftModelForCausalLM.from_pretrained("me/unsaved")
except OSError as error:
    assert "save it, and make adapters of the saved model" in str(error), error
else:
    raise AssertionError("loaded")
""",
        tmp_path,
    )
