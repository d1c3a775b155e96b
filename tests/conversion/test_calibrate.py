"""`calibrate`: statistics of converted models from data."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import BERT, GPT2, VOCAB, ModelCase, logits
from forked import in_processes
from torch import Tensor

import hf_linattn
from hf_linattn import ConfigError, InputError, UncalibratedError
from hf_linattn.functional import favor_statistics
from hf_linattn.integrations.attach import family_layers

NEEDS_DATA = [
    pytest.param("favor_sharp", GPT2, {}, id="favor_sharp-gpt2"),
    pytest.param("favor_sharp", GPT2, {"variant": "dense"}, id="dense-gpt2"),
    pytest.param("lara", GPT2, {}, id="lara-gpt2"),
    pytest.param("favor_sharp", BERT, {"statistics": "calibrated", "variant": "dense"}, id="favor_sharp-bert"),
    pytest.param("lara", BERT, {"proposal_source": "calibrated"}, id="lara-bert"),
]


def converted(kind: str, case: ModelCase, **changes: Any) -> Any:
    return hf_linattn.convert(case.build(), case.settings(kind, **changes))


def data(rows: int = 4, seed: int = 0, batch: int = 2) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, VOCAB, (batch, 40), generator=generator)} for _ in range(rows)]


def buffers(model: Any) -> dict[str, Tensor]:
    return {
        f"{index}.{name}": buffer.clone()
        for index, layer in enumerate(family_layers(model))
        for name, buffer in layer.linattn.named_buffers()
    }


@pytest.mark.parametrize(("kind", "case", "changes"), NEEDS_DATA)
def test_an_uncalibrated_model_raises_and_says_what_to_do(kind: str, case: ModelCase, changes: dict[str, Any]) -> None:
    model = converted(kind, case, **changes)
    with pytest.raises(UncalibratedError, match=r"Layer 0 .* hf_linattn\.calibrate\(model, batches\)"):
        logits(model, **case.inputs())
    assert hf_linattn.calibrate(model, data()) is model
    assert bool(logits(model, **case.inputs()).isfinite().all())


@pytest.mark.parametrize(("kind", "case", "changes"), NEEDS_DATA)
def test_a_calibrated_model_is_saved_with_its_statistics(
    kind: str, case: ModelCase, changes: dict[str, Any], tmp_path: Path
) -> None:
    model = hf_linattn.calibrate(converted(kind, case, **changes), data())
    model.save_pretrained(tmp_path)
    loaded = case.auto.from_pretrained(tmp_path)
    expected = buffers(model)
    assert all(torch.equal(buffer, expected[name]) for name, buffer in buffers(loaded).items())
    # Not bit by bit: loaded tensors are not aligned in memory, and small matrix products then round differently.
    torch.testing.assert_close(logits(loaded, **case.inputs()), logits(model, **case.inputs()), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "case", "changes"), NEEDS_DATA)
def test_calibration_leaves_the_model_as_it_was(kind: str, case: ModelCase, changes: dict[str, Any]) -> None:
    model = converted(kind, case, **changes).train()
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    implementation = model.config._attn_implementation
    hf_linattn.calibrate(model, data())
    assert model.training
    assert model.config._attn_implementation == implementation
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("kind", "case", "changes"), NEEDS_DATA)
def test_padding_does_not_count(kind: str, case: ModelCase, changes: dict[str, Any]) -> None:
    plain, padded = (converted(kind, case, **changes) for _ in range(2))
    rows = [{"input_ids": torch.randint(3, VOCAB, (1, length))} for length in (12, 20)]
    ids = torch.full((2, 20), 7)
    mask = torch.zeros(2, 20, dtype=torch.long)
    for number, row in enumerate(rows):
        length = row["input_ids"].shape[1]
        ids[number, :length], mask[number, :length] = row["input_ids"], 1
    if kind == "lara":
        rows = rows + data(2)
    hf_linattn.calibrate(plain, rows)
    hf_linattn.calibrate(padded, [{"input_ids": ids, "attention_mask": mask}, *rows[2:]])
    ours, expected = buffers(padded), buffers(plain)
    for name in expected:
        if kind == "lara" and name.endswith("centroids"):
            continue  # another sample of the same tokens
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-3, atol=1e-4, msg=name)


def test_statistics_of_one_row_are_those_of_the_row() -> None:
    """For the first layer, whose inputs do not depend on the attention."""
    model = converted("favor_sharp", BERT, statistics="calibrated")
    row = BERT.inputs(batch=1)
    captured: dict[str, Tensor] = {}
    layer = family_layers(model)[0]
    layer.query.register_forward_hook(lambda m, i, output: captured.__setitem__("query", output))
    layer.key.register_forward_hook(lambda m, i, output: captured.__setitem__("key", output))
    hf_linattn.calibrate(model, [row])
    query, key = (captured[n].unflatten(-1, (4, 8)).transpose(1, 2) for n in ("query", "key"))
    expected = favor_statistics(query, key)
    shape = layer.linattn.statistics_shape
    torch.testing.assert_close(shape, expected.shape.expand_as(shape).float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.linattn.statistics_key_mean, expected.key_mean, rtol=1e-4, atol=1e-5)


def test_again_replaces_and_linear_uses_the_models_own_attention() -> None:
    model = hf_linattn.calibrate(converted("favor_sharp", GPT2), data(seed=1))
    first = buffers(model)
    again = hf_linattn.calibrate(model, data(seed=2))
    second = buffers(again)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    own = buffers(hf_linattn.calibrate(copy.deepcopy(model), data(seed=2), attention="linear"))
    assert all(torch.equal(own[name], second[name]) for name in own if name.startswith("0."))
    assert any(not torch.equal(own[name], second[name]) for name in own if name.startswith("1."))
    with pytest.raises(UncalibratedError):
        hf_linattn.calibrate(converted("favor_sharp", GPT2), data(), attention="linear")


def test_dropout_is_off_meanwhile() -> None:
    models = [hf_linattn.calibrate(converted("favor_sharp", GPT2).train(mode), data()) for mode in (True, False)]
    first, second = (buffers(model) for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_calibrated_features_are_closer_to_softmax() -> None:
    plus = converted("favor_plus", GPT2, window_size=0, num_features=64)
    sharp = converted("favor_sharp", GPT2, window_size=0, num_features=64, variant="dense")
    hf_linattn.calibrate(sharp, data(8, seed=5))
    errors = [hf_linattn.compare(model, data(2)).mean_layer_error for model in (plus, sharp)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (
            ConfigError,
            "needs a converted model; got GPT2LMHeadModel",
            lambda m: hf_linattn.calibrate(GPT2.build(), data()),
        ),
        (ConfigError, "kind 'favor_plus'", lambda m: hf_linattn.calibrate(converted("favor_plus", GPT2), data())),
        (
            ConfigError,
            "statistics='calibrated'",
            lambda m: hf_linattn.calibrate(converted("favor_sharp", BERT), data()),
        ),
        (InputError, "`batches` is empty", lambda m: hf_linattn.calibrate(m, [])),
        (InputError, "must be a series of dictionaries", lambda m: hf_linattn.calibrate(m, data()[0])),
        (InputError, "attention must be one of", lambda m: hf_linattn.calibrate(m, data(), attention="eager")),
    ],
)
def test_bad_requests_of_calibrate(error: type[Exception], message: str, call: Any) -> None:
    with pytest.raises(error, match=message):
        call(converted("favor_sharp", GPT2))


def test_a_failed_calibration_changes_nothing() -> None:
    model = hf_linattn.calibrate(converted("favor_sharp", GPT2), data())
    before = buffers(model)
    with pytest.raises(InputError, match="dictionary of model inputs"):
        hf_linattn.calibrate(model, [*data(1), "a text"])
    assert all(torch.equal(before[name], buffer) for name, buffer in buffers(model).items())
    assert bool(logits(model, **GPT2.inputs()).isfinite().all())


# -- what a layer knows of its calibration ---------------------------------------------------------------------------
BOTH = pytest.mark.parametrize(("kind", "changes"), [("favor_sharp", {}), ("lara", {})])


@BOTH
def test_uncalibrated_weights_over_calibrated_ones_are_noticed(kind: str, changes: dict[str, Any]) -> None:
    fresh = converted(kind, GPT2, **changes).state_dict()
    model = hf_linattn.calibrate(converted(kind, GPT2, **changes), data())
    good = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = logits(model, **GPT2.inputs())
    for other in (model, copy.deepcopy(model)):
        other.load_state_dict(fresh)
        assert hf_linattn.needs_calibration(other)
        with pytest.raises(UncalibratedError):
            logits(other, **GPT2.inputs())
        other.load_state_dict(good)
        assert torch.equal(logits(other, **GPT2.inputs()), expected)
    for layer in family_layers(model):
        layer.linattn.reset_parameters()
    with pytest.raises(UncalibratedError):
        logits(model, **GPT2.inputs())


@BOTH
def test_compiling_an_uncalibrated_model_raises(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    torch.compiler.reset()
    model = converted(kind, GPT2, **changes)
    with pytest.raises(Exception, match="needs statistics of data"):
        logits(torch.compile(model, backend="eager", fullgraph=True), **GPT2.inputs(), use_cache=False)
    torch.compiler.reset()
    hf_linattn.calibrate(model, data()).save_pretrained(tmp_path)
    loaded = GPT2.auto.from_pretrained(tmp_path)  # compiled before it has run once
    compiled = logits(torch.compile(loaded, backend="eager", fullgraph=True), **GPT2.inputs(), use_cache=False)
    torch.testing.assert_close(compiled, logits(model, **GPT2.inputs()), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("message", "batch"),
    [
        ("attention_mask must be 2-D", {"attention_mask": torch.ones(2, 1, 40, 40)}),
        ("'input_ids' of a batch must be a tensor; got list", {"input_ids": [[3, 4, 5]]}),
    ],
)
def test_batches_that_cannot_be_read(message: str, batch: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=message):
        hf_linattn.calibrate(converted("favor_sharp", GPT2), [{**data(1)[0], **batch}])


# -- several processes ----------------------------------------------------------------------------------------------
def _calibrate_rank() -> dict[str, Tensor]:
    rank, found = dist.get_rank(), {}
    for kind in ("favor_sharp", "lara"):
        model = converted(kind, GPT2)
        hf_linattn.calibrate(model, data(4)[rank::2][: 2 - rank])  # ranks have different amounts of data
        found |= {f"{kind} {name}": tensor for name, tensor in buffers(model).items()}
    return found


def test_ranks_agree(tmp_path: Path) -> None:
    first, second = in_processes(tmp_path, 2, _calibrate_rank)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for kind in ("favor_sharp", "lara"):
        alone = converted(kind, GPT2)
        batches = data(4)
        hf_linattn.calibrate(alone, [batches[0], batches[2], batches[1]])
        for name, expected in buffers(alone).items():
            if kind == "lara" and name.endswith("centroids"):
                assert bool(first[f"{kind} {name}"].isfinite().all())
                continue
            torch.testing.assert_close(first[f"{kind} {name}"], expected, rtol=1e-3, atol=1e-4, msg=name)
