"""`extend_positions`: the longer table, and what the model computes with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BERT, GPT2, logits
from position_tables import CASES, FORMS, NEW, OLD, snapshot, table_of, tokens
from torch import Tensor, nn
from transformers import PreTrainedModel

import hf_linattn
from hf_linattn import extend_positions
from hf_linattn.errors import InputError
from hf_linattn.models import COUNTERPARTS

METHODS = ["tile", "interpolate"]
TEXT_CLASSES = [cls for cls in COUNTERPARTS if not cls.__name__.startswith("ViT")]


def expected(old: Tensor, new: int, method: str) -> Tensor:
    if method == "tile":
        return torch.cat([old] * (new // len(old) + 1))[:new]
    wide = nn.functional.interpolate(old.double().T[None], size=new, mode="linear", align_corners=True)
    return wide[0].T


# -- what it does ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_longer_inputs(case: Any, method: str, dtype: torch.dtype, form: str, tmp_path: Path) -> None:
    model = FORMS[form](case).to(dtype)
    cls, table = type(model), table_of(model)
    weight, old = table.weight, table.weight.detach().clone()
    short, long = tokens(OLD), tokens(NEW)
    before = logits(model, input_ids=short)
    with pytest.raises((IndexError, RuntimeError, InputError)):
        logits(model, input_ids=long)

    assert extend_positions(model, NEW, method=method) is model
    assert type(model) is cls
    assert table_of(model) is table
    assert table.weight is weight
    assert (table.num_embeddings, *weight.shape, weight.dtype) == (NEW, NEW, 32, dtype)
    assert model.config.max_position_embeddings == NEW
    want = expected(old, NEW, method)
    if method == "tile":
        assert torch.equal(weight, want)
        assert torch.equal(logits(model, input_ids=short), before)
    else:
        error = (weight.detach().double() - want).abs()
        assert float((error / want.abs().clamp(min=1e-2)).max()) < (1e-3 if dtype == torch.float32 else 2**-7)
        assert torch.equal(weight[[0, -1]], old[[0, -1]])
    after = logits(model, input_ids=long)
    assert bool(after.isfinite().all())
    with pytest.raises((IndexError, RuntimeError, InputError)):
        logits(model, input_ids=tokens(NEW + 1))

    model.save_pretrained(tmp_path)
    loaded, info = case.auto.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert type(loaded) is cls
    assert table_of(loaded).weight.shape == (NEW, 32)
    assert loaded.config.max_position_embeddings == NEW
    assert torch.equal(logits(loaded.eval(), input_ids=long), after)


def test_interpolation_is_in_float32() -> None:
    """Each row of a half-precision table is the rounded value of the exact one, not of a rounded sum."""
    model = GPT2.build(n_positions=5).to(torch.bfloat16)
    old = table_of(model).weight.detach().clone()
    extend_positions(model, 8192, method="interpolate")
    exact = expected(old, 8192, "interpolate").bfloat16()
    assert float((table_of(model).weight != exact).float().mean()) < 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_a_table_of_one_row_and_no_change(method: str) -> None:
    model = GPT2.build(n_positions=1)
    row = table_of(model).weight.detach().clone()
    extend_positions(model, 3, method=method)
    assert torch.equal(table_of(model).weight, row.expand(3, -1))
    weight = table_of(model).weight
    weight.grad = gradient = torch.ones_like(weight)
    before = snapshot(model)
    assert extend_positions(model, 3, method=method) is model
    assert repr(snapshot(model)) == repr(before)
    assert weight.grad is gradient


def test_tiles_unless_told_otherwise() -> None:
    model = GPT2.build()
    old = table_of(model).weight.detach().clone()
    assert torch.equal(table_of(extend_positions(model, NEW)).weight, expected(old, NEW, "tile"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cls", TEXT_CLASSES, ids=lambda cls: cls.__name__)
def test_extended_heads_of_every_class(cls: type[PreTrainedModel], method: str, tmp_path: Path) -> None:
    """Stock and converted, saved and loaded through the class; ties of word embeddings survive."""
    case = GPT2 if cls.__name__.startswith("GPT2") else BERT
    for convert in (False, True):
        model = cls(case.config()).eval()
        if convert:
            model = hf_linattn.convert(model, case.settings("favor_plus"))
        outputs = model.get_output_embeddings()
        tied = outputs is not None and outputs.weight is model.get_input_embeddings().weight
        extend_positions(model, NEW, method=method)
        assert tied == (outputs is not None and outputs.weight is model.get_input_embeddings().weight)
        ids = tokens(NEW, batch=1)
        inputs = {"input_ids": ids[:, None].expand(-1, 2, -1) if "MultipleChoice" in cls.__name__ else ids}
        path = tmp_path / str(convert)
        model.save_pretrained(path)
        loaded = type(model).from_pretrained(path).eval()
        state = loaded.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        # Not bit-equal: a product with one column (multiple choice) depends on where a tensor lies in memory.
        assert torch.allclose(logits(loaded, **inputs), logits(model, **inputs), atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_conversion_before_and_after(case: Any, method: str) -> None:
    """Extending commutes with convert and with revert."""
    settings, ids = case.settings("favor_plus"), {"input_ids": tokens(NEW)}
    first = hf_linattn.convert(extend_positions(case.build(), NEW, method=method), settings)
    second = extend_positions(hf_linattn.convert(case.build(), settings), NEW, method=method)
    assert torch.equal(logits(first, **ids), logits(second, **ids))
    stock = extend_positions(case.build(), NEW, method=method)
    assert torch.equal(logits(hf_linattn.revert(second), **ids), logits(stock, **ids))
    assert second.config.max_position_embeddings == NEW


@pytest.mark.parametrize("form", ["stock", "favor_plus"])
def test_bert_buffers(form: str) -> None:
    """Default positions and segments are as long as the table, and no part of checkpoints."""
    model = FORMS[form](BERT)
    embeddings = model.base_model.embeddings
    names = set(model.state_dict())
    kinds = {name: (buffer.dtype, buffer.device) for name, buffer in embeddings.named_buffers()}
    extend_positions(model, NEW)
    assert torch.equal(embeddings.position_ids, torch.arange(NEW)[None])
    assert torch.equal(embeddings.token_type_ids, torch.zeros(1, NEW, dtype=torch.long))
    assert {name: (buffer.dtype, buffer.device) for name, buffer in embeddings.named_buffers()} == kinds
    assert set(model.state_dict()) == names
    ids = tokens(NEW)
    explicit = {"token_type_ids": torch.zeros_like(ids), "position_ids": torch.arange(NEW)[None]}
    assert torch.equal(logits(model, input_ids=ids, **explicit), logits(model, input_ids=ids))
