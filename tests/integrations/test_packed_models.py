"""Packed batches in models: every text gives what it gives alone, whatever says where it starts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BERT, GPT2, MODES, TOKENS, VIT, VOCAB, ModelCase, converted, largest, logits, matrix, native
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DataCollatorWithFlattening

import hf_linattn
from hf_linattn.errors import InputError, LinAttnError
from hf_linattn.integrations import interface
from hf_linattn.ops import row_groups
from hf_linattn.training import key_noise

COLLATORS = [
    {},
    {"return_seq_idx": True},
    {"return_flash_attn_kwargs": True},
    {"return_flash_attn_kwargs": True, "return_seq_idx": True},
]
ALL_SAY = {"return_flash_attn_kwargs": True, "return_seq_idx": True}


def texts(lengths: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator) for length in lengths]


def packed(rows: list[Tensor], **says: bool) -> dict[str, Any]:
    batch = DataCollatorWithFlattening(**says)([{"input_ids": row} for row in rows])
    return {name: value for name, value in batch.items() if name != "labels"} | {"use_cache": False}


def alone(model: Any, rows: list[Tensor]) -> Tensor:
    return torch.cat([model(input_ids=row[None])[0] for row in rows], dim=1)


@functools.cache
def model_of(kind: str, case: ModelCase, mode: Callable[..., Any], **changes: Any) -> Any:
    return mode(case, kind, **changes)


@pytest.mark.parametrize(
    ("kind", "case", "mode"),
    [pytest.param(*p.values, converted, id=f"{p.id}-converted") for p in matrix(BERT, GPT2)]
    + [pytest.param(*p.values, native, id=f"{p.id}-native") for p in matrix(BERT, GPT2, native=True)],
)
@settings(max_examples=4, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=6),
    says=st.sampled_from(COLLATORS),
    cost=st.sampled_from([0, 40, 10**6]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 9),
)
@pytest.mark.filterwarnings("ignore:FAVOR# has no calibrated")
def test_every_text_gives_what_it_gives_alone(
    kind: str, case: ModelCase, mode: Any, lengths: list[int], says: Any, cost: int, dtype: Any, seed: int
) -> None:
    model, rows = model_of(kind, case, mode).to(dtype), texts(lengths, seed)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(row_groups._GROUP_COST, "cpu", cost)
            mine = model(**packed(rows, **says))[0]
        theirs = alone(model, rows)
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(mine, theirs, atol=tolerance * 4, rtol=tolerance)
        if dtype == torch.float32:
            weights = [weight for weight in model.parameters() if weight.requires_grad]
            loss = torch.randn_like(mine)
            pairs = [torch.autograd.grad(output, weights, loss, allow_unused=True) for output in (mine, theirs)]
            found = [pair for pair in zip(*pairs, strict=True) if all(z is not None for z in pair)]
            # Of all gradients: that of a bias of keys is 0, and what is left of it a sum of roundings.
            size = max(largest(other) for _, other in found)
            assert max(largest(one - other) for one, other in found) <= 1e-5 * max(1.0, size)
    finally:
        model.to(torch.float32)


@pytest.mark.parametrize("mode", MODES)
def test_no_gradient_crosses_a_border(mode: Any) -> None:
    model = model_of("favor_plus", GPT2, mode)
    given = packed(texts([9, 14, 7]), **ALL_SAY)
    vectors = model.get_input_embeddings()(given.pop("input_ids")).detach().requires_grad_()
    model(inputs_embeds=vectors, **given)[0][:, 9:23].square().sum().backward()
    assert vectors.grad is not None
    assert largest(vectors.grad[:, :9]) == largest(vectors.grad[:, 23:]) == 0
    assert largest(vectors.grad[:, 9:23]) > 0


@pytest.mark.parametrize("case", [BERT, GPT2], ids=lambda case: case.name)
def test_layers_left_on_softmax(case: ModelCase) -> None:
    """They hide the other texts as well, and read no padding of their groups."""
    model, rows = converted(case, "favor_plus", layers=[1]), texts([5, 31, 12])
    for says in COLLATORS:
        torch.testing.assert_close(logits(model, **packed(rows, **says)), alone(model, rows), atol=2e-5, rtol=1e-5)


def _compiled(name: str, case: ModelCase, mode: Any, training: bool, *, slow: bool = True) -> Any:
    name_of_all = f"{name}-{case.name}-{mode.__name__}-{'training' if training else 'forward'}"
    return pytest.param(name, case, mode, training, marks=[pytest.mark.slow] if slow else [], id=name_of_all)


@pytest.mark.parametrize(
    ("kind", "case", "mode", "training"),
    [
        _compiled("favor_plus", GPT2, converted, True, slow=False),
        _compiled("favor_plus", BERT, native, False),
        *[_compiled("eva", case, mode, True) for case in (BERT, GPT2) for mode in (native, converted)],
        _compiled("lara", BERT, converted, False),
    ],
)
def test_compiled(kind: str, case: ModelCase, mode: Any, training: bool) -> None:
    """One graph, given where texts start and the longest length; it looks whether positions agree."""
    torch._dynamo.reset()
    model = mode(case, kind)
    model.config.use_cache = False
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(training):
        for lengths in ([9, 14, 7], [14, 2, 14], [16 - 2, 0 + 5, 11]):
            rows = texts(lengths)
            batch = packed(rows, **ALL_SAY) | {"max_length_q": 14, "max_length_k": 14}
            mine, theirs = compiled(**batch)[0], alone(model, rows)
            torch.testing.assert_close(mine, theirs, atol=4e-5, rtol=1e-5)
            if training:
                weight = model.get_input_embeddings().weight
                one, other = (torch.autograd.grad(output.square().sum(), weight)[0] for output in (mine, theirs))
                assert largest(one - other) <= 1e-5 * max(1.0, float(other.abs().max()))
        wrong = batch | {"position_ids": torch.arange(batch["input_ids"].shape[1])[None]}
        with pytest.raises(RuntimeError, match="says where packed sequences start disagree"):
            compiled(**wrong)
        with pytest.raises(RuntimeError, match="longer than max_length"):
            compiled(**packed(texts([15, 8, 7]), **ALL_SAY) | {"max_length_q": 14, "max_length_k": 14})


@pytest.mark.parametrize("mode", MODES)
def test_several_rows_of_several_texts(mode: Any) -> None:
    model, ids = model_of("eva", GPT2, mode), torch.stack(texts([20, 20]))
    positions = torch.tensor([[*range(8), *range(12)], [*range(15), *range(5)]])
    mine = logits(model, input_ids=ids, position_ids=positions, use_cache=False)
    theirs = alone(model, [ids[0, :8], ids[0, 8:], ids[1, :15], ids[1, 15:]])
    torch.testing.assert_close(mine.flatten(0, 1)[None], theirs, atol=2e-5, rtol=1e-5)


def test_one_text_is_an_ordinary_row() -> None:
    model, (row,) = model_of("favor_plus", GPT2, converted), texts([21])
    assert largest(logits(model, **packed([row], **ALL_SAY)) - logits(model, input_ids=row[None])) == 0


def test_random_numbers_belong_to_texts() -> None:
    """Told the place in training, groups do not change them, nor does the next text; equal texts have others."""
    model = converted(BERT, "lara", slot_dropout=0.5, sample_noise=True)
    for module in model.modules():
        module.training = module.__class__.__name__.endswith("Attention") and hasattr(module, "ablation")
    (row, other), found = texts([20, 9]), []
    for cost in (0, 10**6):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(row_groups._GROUP_COST, "cpu", cost)
            key_noise(model, 3, rows=1)
            found.append(logits(model, **packed([row, row, other])))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
    assert largest(found[0][:, :20] - found[0][:, 20:40]) > 0.01


@pytest.mark.parametrize(("kind", "case"), matrix(BERT, GPT2))
def test_padded_batches_take_the_same_road(kind: str, case: ModelCase, monkeypatch: pytest.MonkeyPatch) -> None:
    model, lengths = model_of(kind, case, converted), torch.tensor([TOKENS, 3, 17, 0, 30])
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    mask[2] = mask[2].flip(0)
    batch = {"input_ids": torch.stack(texts([TOKENS] * 5)), "attention_mask": mask, "use_cache": False}
    for cost in (0, 10**6):
        monkeypatch.setitem(row_groups._GROUP_COST, "cpu", cost)
        grouped = model(**batch)[0]
        with monkeypatch.context() as patch:
            patch.setattr(interface, "padded_sequences", lambda *_: None)
            masked = model(**batch)[0]
        real = mask.bool()
        torch.testing.assert_close(grouped[real], masked[real], atol=2e-5, rtol=1e-5)
        weight = model.get_input_embeddings().weight
        one, other = (torch.autograd.grad(y[real].square().sum(), weight)[0] for y in (grouped, masked))
        assert largest(one - other) <= 1e-5 * max(1.0, float(other.abs().max()))


def _with(batch: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**batch, **changes}


BATCH = packed(texts([9, 14, 7]), **ALL_SAY)
SHIFTED = torch.tensor([0, 10, 23, 30], dtype=torch.int32)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "one border elsewhere": (_with(BATCH, cu_seq_lens_q=SHIFTED), "starts a sequence at token"),
    "keys of others": (_with(BATCH, cu_seq_lens_k=SHIFTED), "starts a sequence at token"),
    "other numbers": (_with(BATCH, seq_idx=BATCH["seq_idx"] * 0), "and seq_idx does not"),
    "positions go on": (_with(BATCH, position_ids=torch.arange(30)[None]), "and position_ids does not"),
    "no positions": (_with(BATCH, position_ids=None), "position_ids"),
    "a cache": (_with(BATCH, use_cache=True), "use_cache=False"),
    "a mask": (_with(BATCH, attention_mask=torch.tensor([[0] * 2 + [1] * 28])), "leave the mask out"),
    "a short length": (_with(BATCH, max_length_q=13), "max_length_q must be at least 14"),
    "borders of others": (_with(BATCH, cu_seq_lens_q=SHIFTED[:3], cu_seq_lens_k=None), "end at the 30 tokens"),
    "numbers of others": (_with(BATCH, seq_idx=BATCH["seq_idx"][:, 1:]), "seq_idx must be"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_raises(name: str, mode: Any) -> None:
    batch, words = REFUSED[name]
    with pytest.raises(InputError, match=words):
        logits(model_of("favor_plus", GPT2, mode), **batch)


@pytest.mark.parametrize("mode", MODES)
def test_images_are_not_packed(mode: Any) -> None:
    with pytest.raises(LinAttnError, match="Packed sequences"):
        logits(model_of("favor_plus", VIT, mode), **VIT.inputs(1), cu_seq_lens_q=torch.tensor([0, 20, 37]))


@pytest.mark.parametrize(("kind", "case"), [("lara", GPT2), ("favor_sharp", GPT2)], ids=["lara", "favor_sharp"])
def test_calibration_on_packed_batches(kind: str, case: ModelCase) -> None:
    """Layers are looked into as with the padded batch of the same texts."""
    rows, found = texts([12, 30, 21]), []
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    padded = {"input_ids": ids, "attention_mask": (torch.arange(30) < torch.tensor([[12], [30], [21]])).long()}
    for batch in (padded, packed(rows, **ALL_SAY)):
        model = hf_linattn.convert(case.build(), case.settings(kind))
        found.append(dict(hf_linattn.calibrate(model, [batch]).named_buffers()))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-4, rtol=1e-4)
