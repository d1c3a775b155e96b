"""What `calibrate` cannot take statistics of: an error with the numbers, and every layer as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import BERT, GPT2, VIT, ModelCase, logits
from test_calibrate import buffers, converted, data

import hf_linattn
from hf_linattn import InputError, UncalibratedError
from hf_linattn.modules.base import AttentionInputs, LayerShape
from hf_linattn.modules.kinds.lara_calibration import ProposalCalibration
from hf_linattn.ops.favor.statistics import FAVOR_VARIANTS

DENSE = ("aderf", "sderf", "dense")
# Kind, changes to its settings, real tokens needed with heads of 8 dimensions.
NEEDS = [("favor_sharp", {"variant": v}, 9 if v in DENSE else 2) for v in FAVOR_VARIANTS]
NEEDS += [("favor_sharp", {"variant": "dense", "centring": False}, 9), ("lara", {}, 8)]
CAUSAL = [("favor_sharp", {"variant": "dense"}), ("favor_sharp", {}), ("lara", {})]
CASES = [(GPT2, {}), (BERT, {"statistics": "calibrated"}), (BERT, {"proposal_source": "calibrated"})]


def row(tokens: int, padding: int = 3) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 60, (1, tokens + padding))
    return {"input_ids": ids, "attention_mask": torch.tensor([[1] * tokens + [0] * padding])}


def combinations() -> list[Any]:
    found = []
    for case, source in CASES:
        for kind, changes, needed in NEEDS:
            if not source or ("statistics" in source) == (kind == "favor_sharp"):
                named = f"{case.name}-{kind}-{'-'.join(map(str, changes.values()))}"
                found.append(pytest.param(case, kind, {**source, **changes}, needed, id=named))
    return found


@pytest.mark.parametrize(("case", "kind", "changes", "needed"), combinations())
def test_too_few_tokens(case: ModelCase, kind: str, changes: dict[str, Any], needed: int) -> None:
    model = converted(kind, case, **changes)
    before = buffers(model)
    with pytest.raises(InputError, match=rf"{needed} .*tokens.*; got {needed - 1}\b.*more batches"):
        hf_linattn.calibrate(model, [row(needed - 1)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in buffers(model).items())
    with pytest.raises(UncalibratedError):
        logits(model, **case.inputs())
    hf_linattn.calibrate(model, [row(needed)])
    assert bool(logits(model, **case.inputs()).isfinite().all())


def test_tokens_of_all_batches_count() -> None:
    model = converted("favor_sharp", GPT2, variant="dense")
    hf_linattn.calibrate(model, [row(3), row(3), row(3)])
    with pytest.raises(InputError, match="got 6"):
        hf_linattn.calibrate(model, [row(3), row(3)])


@pytest.mark.parametrize(
    ("kind", "changes"), [("favor_sharp", {"variant": "dense"}), ("favor_sharp", {}), ("lara", {})]
)
def test_an_error_leaves_an_earlier_calibration(kind: str, changes: dict[str, Any]) -> None:
    """Of any layer: the last one raises here, when those before have their statistics ready."""
    model = hf_linattn.calibrate(converted(kind, GPT2, **changes), data())
    before, want = buffers(model), logits(model, **GPT2.inputs())
    last = model.transformer.h[-1].attn.c_attn
    weight = last.weight.detach().clone()
    for broken in (float("nan"), float("inf")):
        with torch.no_grad():
            last.weight[0, 0] = broken
        with pytest.raises(InputError, match=r"not all finite.*layer 1"):
            hf_linattn.calibrate(model, data(seed=1))
        with torch.no_grad():
            last.weight.copy_(weight)
        assert all(torch.equal(tensor, before[name]) for name, tensor in buffers(model).items())
        assert torch.equal(logits(model, **GPT2.inputs()), want)


@pytest.mark.parametrize(
    ("kind", "changes"), [("favor_sharp", {"variant": "dense"}), ("favor_sharp", {}), ("lara", {})]
)
def test_equal_tokens(kind: str, changes: dict[str, Any]) -> None:
    model = converted(kind, GPT2, **changes)
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
    with pytest.raises(InputError, match=r"equal.*layer 0"):
        hf_linattn.calibrate(model, [{"input_ids": torch.full((2, 40), 5)}])
    with pytest.raises(UncalibratedError):
        logits(model, **GPT2.inputs())


def test_one_head_may_be_constant() -> None:
    """A pruned head is no reason to refuse a model."""
    model = converted("favor_sharp", GPT2, variant="dense")
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[:, :8] = 0
        model.transformer.h[0].attn.c_attn.weight[:, 32:40] = 0
    hf_linattn.calibrate(model, data())
    assert bool(logits(model, **GPT2.inputs()).isfinite().all())


def test_a_broken_token_that_the_sample_drops_is_told() -> None:
    """And told by `result`, which all processes reach, so that none waits for one that has raised."""
    config, shape = hf_linattn.LaraConfig(num_landmarks=4), LayerShape(num_heads=2, head_dim=4, is_causal=True)
    calibration, other = (ProposalCalibration(config.num_landmarks, config, shape, stream) for stream in (0, 1))
    query = torch.randn(1, 2, 30, 4)
    query[0, 1, 7, 2] = float("nan")
    calibration.update(AttentionInputs(query, query, query, None, scaling=1.0, is_causal=True))
    other.update(AttentionInputs(*[torch.randn(1, 2, 30, 4)] * 3, None, scaling=1.0, is_causal=True))
    states = [other.state(), calibration.state()]
    other.merge(states)
    with pytest.raises(InputError, match="not all finite"):
        other.result()


def test_images_count_patches() -> None:
    model = converted("favor_sharp", VIT, statistics="calibrated", variant="dense")
    hf_linattn.calibrate(model, [VIT.inputs()])
    assert not hf_linattn.needs_calibration(model)
