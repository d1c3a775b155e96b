"""Random numbers of a layer's training passes: those of the rows once it has been told where training is."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import BERT, GPT2, ModelCase, checkpoint_activations, ready
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import hf_linattn
from hf_linattn.errors import InputError
from hf_linattn.modules.training_place import row_noise
from hf_linattn.training import key_noise

SETTINGS: dict[str, dict[str, Any]] = {
    "favor_plus": {"slot_dropout": 0.4},
    "lara": {"slot_dropout": 0.4, "sample_noise": True},
    "eva": {"slot_dropout": 0.4, "sample_noise": True},
}
CASES = [(BERT, "favor_plus"), (GPT2, "favor_plus"), (BERT, "lara"), (GPT2, "lara"), (BERT, "eva"), (GPT2, "eva")]
every = pytest.mark.parametrize(("case", "kind"), CASES, ids=[f"{case.name}-{kind}" for case, kind in CASES])


def build(case: ModelCase, kind: str, **changes: Any) -> Any:
    """A model whose only random numbers in training are those of the kind."""
    dropouts = ("hidden_dropout_prob",) if case is BERT else ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    model = case.build(**dict.fromkeys(dropouts, 0.0))
    model = ready(hf_linattn.convert(model, case.settings(kind, **SETTINGS[kind], **changes)))
    return model.train()


def logits(model: Any, inputs: dict[str, Tensor], rows: slice = slice(None)) -> Tensor:
    found: Tensor = model(**{name: z[rows] for name, z in inputs.items()}, use_cache=False).logits
    return found


def close(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).abs().max() < 1e-4)


@every
def test_numbers_follow_from_seed_step_layer_and_row(case: ModelCase, kind: str) -> None:
    model, inputs = build(case, kind), case.inputs(4)
    assert key_noise(model, 5, 8, rows=4, seed=1) == 2
    state = torch.get_rng_state()
    whole = logits(model, inputs)
    assert torch.equal(logits(model, inputs), whole)
    assert torch.equal(torch.get_rng_state(), state)  # torch's generator draws nothing
    assert not close(whole, logits(copy.deepcopy(model).eval(), inputs))

    key_noise(model, 5, 10, rows=2, seed=1)  # of the second of two processes
    assert close(logits(model, inputs, slice(2, 4)), whole[2:])
    for place in ((6, 8, 1), (5, 9, 1), (5, 8, 2)):
        key_noise(model, *place[:2], rows=4, seed=place[2])
        assert not close(logits(model, inputs), whole), place
    # Rows are independent; only calibrated LARA has the same noise for all, but dropout of its own.
    key_noise(model, 5, 8, rows=4, seed=1)
    twice = {name: z[:1].expand(2, *z.shape[1:]) for name, z in inputs.items()}
    one, other = logits(model, twice)
    assert not close(one, other)


@every
def test_layers_have_numbers_of_their_own(case: ModelCase, kind: str) -> None:
    model = build(case, kind)
    key_noise(model, 0)
    layers = [module for module in model.modules() if hasattr(module, "training_place")]
    query = torch.zeros(2, 4, 8, 8)
    first, second = (layer.training_place.noise(query).keys for layer in layers)
    assert not (first == second).any()
    assert not (first[0] == first[1:]).any()


@every
def test_untold_layers_draw_keys_from_the_generator(case: ModelCase, kind: str) -> None:
    model, inputs = build(case, kind), case.inputs(2)
    torch.manual_seed(3)
    first, second = logits(model, inputs), logits(model, inputs)
    assert not close(first, second)
    torch.manual_seed(3)
    assert torch.equal(logits(model, inputs), first)
    key_noise(model, 0)
    told = logits(model, inputs)
    assert key_noise(model, None) == 0
    torch.manual_seed(3)
    assert torch.equal(logits(model, inputs), first)
    assert not close(told, first)


@every
@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_pass_that_is_done_again_has_the_same_numbers(
    case: ModelCase, kind: str, told: bool, use_reentrant: bool
) -> None:
    def gradients(recompute: bool) -> list[Tensor]:
        model = build(case, kind)
        if told:
            key_noise(model, 3)
        if recompute:
            checkpoint_activations(model, {"use_reentrant": use_reentrant})
        torch.manual_seed(0)
        ids = case.inputs(2)["input_ids"]
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for kept, again in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(kept, again, rtol=1e-4, atol=1e-5)


def test_parts_of_a_row_share_its_number() -> None:
    """Such as the answers of a question, which are rows of attention but not of the batch."""
    model = build(BERT, "favor_plus")
    layer = next(module for module in model.modules() if hasattr(module, "training_place"))
    key_noise(model, 0, 4, rows=4)
    whole = layer.training_place.noise(torch.zeros(12, 4, 8, 8)).keys
    assert len(set(whole.tolist())) == 12
    key_noise(model, 0, 6, rows=2)
    assert torch.equal(layer.training_place.noise(torch.zeros(6, 4, 8, 8)).keys, whole[6:])
    key_noise(model, 0, 0, rows=4)
    assert not set(layer.training_place.noise(torch.zeros(12, 4, 8, 8)).keys.tolist()) & set(whole.tolist())


@pytest.mark.parametrize("kind", SETTINGS)
def test_compiled_once_for_all_steps(kind: str) -> None:
    layer = next(module for module in build(BERT, kind).modules() if hasattr(module, "training_place"))
    tokens = [torch.randn(4, 4, 20, 8) for _ in range(3)]
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for step in range(4):
        key_noise(compiled, step, 4 * step, rows=4)
        assert close(compiled(*tokens), layer(*tokens)), step
    assert counter.frame_count == 1


def test_heads_that_are_split_over_processes_keep_their_numbers() -> None:
    layer: Any = next(module for module in build(BERT, "eva").modules() if hasattr(module, "training_place"))
    key_noise(layer, 0)
    like = torch.zeros(2, 4, 8, 8)
    whole = row_noise(layer, like).normal(like)
    layer.local_heads = SimpleNamespace(rank=1)
    assert torch.equal(row_noise(layer, like[:, :2]).normal(like[:, :2]), whole[:, 2:])


def test_replicas_of_data_parallel_leave_it_to_the_generator() -> None:
    model = build(BERT, "favor_plus")
    key_noise(model, 0, rows=4)
    layer = next(module for module in model.modules() if hasattr(module, "training_place"))
    replica = layer._replicate_for_data_parallel()
    replica._former_parameters = {}
    tokens = [torch.randn(2, 4, 40, 8) for _ in range(3)]
    assert torch.equal(layer(*tokens), layer(*tokens))
    for name, buffer in layer.named_buffers():
        setattr(replica, name, buffer)
    assert not close(replica(*tokens), replica(*tokens))


def test_place_is_neither_saved_nor_broadcast() -> None:
    model = build(BERT, "favor_plus")
    names = set(model.state_dict())
    key_noise(model, 3, 4)
    assert set(model.state_dict()) == names
    assert not [name for name, _ in model.named_buffers() if "place" in name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.deepcopy(model)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"step": -1}, "step must be"),
        ({"step": 0, "first_row": -1}, "first_row must be an integer >= 0; got -1"),
        ({"step": 0, "first_row": True}, "first_row must be an integer"),
        ({"step": 0, "first_row": 2**31}, "first_row must be below"),
        ({"step": 0, "rows": 0}, "rows must be an integer >= 1; got 0"),
        ({"step": 0, "seed": -1}, "seed must be an integer >= 0"),
    ],
)
def test_impossible_places(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        key_noise(build(BERT, "favor_plus"), **given)


def test_models_without_random_numbers() -> None:
    assert key_noise(hf_linattn.convert(BERT.build(), "favor_plus"), 0) == 0
    assert key_noise(nn.Linear(2, 2), 0) == 0


def test_a_checkpointed_function_of_one_layer() -> None:
    layer = next(m for m in build(BERT, "lara").modules() if hasattr(m, "training_place"))
    tokens = [torch.randn(2, 4, 40, 8, requires_grad=True) for _ in range(3)]
    plain = torch.autograd.grad(layer_under(0, layer, tokens).square().sum(), tokens)
    torch.manual_seed(0)
    again = torch.autograd.grad(checkpoint(layer, *tokens, use_reentrant=False).square().sum(), tokens)
    for kept, redone in zip(plain, again, strict=True):
        torch.testing.assert_close(kept, redone)


def layer_under(seed: int, layer: Any, tokens: list[Tensor]) -> Tensor:
    torch.manual_seed(seed)
    output: Tensor = layer(*tokens)
    return output
