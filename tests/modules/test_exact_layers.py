"""Layers whose input is short: within one window, or within `exact_below`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from cases import CAUSAL_KINDS, KINDS
from helpers import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from hf_linattn.distributed.layers import refusal
from hf_linattn.errors import ConfigError, InputError
from hf_linattn.modules.base import AttentionInputs, LayerShape, LinearAttention
from hf_linattn.modules.registry import config_from_dict, get_kind
from hf_linattn.ops.ablation import SLOTS_ALONE, WINDOW_ALONE

BATCH, HEADS, TOKENS, DIM = 3, 2, 16, 8
SCALING = DIM**-0.5
CASES = [(kind, causal) for causal in (False, True) for kind in (CAUSAL_KINDS if causal else KINDS)]
every = pytest.mark.parametrize(
    ("kind", "is_causal"), CASES, ids=[f"{kind}-{'causal' if causal else 'bidirectional'}" for kind, causal in CASES]
)
# Two ways to be short: all of a row of `TOKENS` in one window, or within the option.
SHORT: dict[str, dict[str, Any]] = {"window": {"window_size": TOKENS}, "exact_below": {"exact_below": TOKENS}}


def build(kind: str, is_causal: bool = False, **changes: Any) -> LinearAttention[Any]:
    """A layer that is calibrated if it has to be, with random values added to what it learns."""
    fields: dict[str, Any] = {"window_size": 4, get_kind(kind).size_field: 8, **changes}
    config = get_kind(kind).config_cls(**{**({"chunk_size": 2} if kind == "eva" and is_causal else {}), **fields})
    torch.manual_seed(0)
    layer = get_kind(kind).module_cls(config, LayerShape(HEADS, DIM, is_causal=is_causal)).eval()
    calibration = layer.new_calibration()
    if calibration is not None:
        tokens = (torch.randn(4, HEADS, 60, DIM) for _ in range(3))
        calibration.update(AttentionInputs(*tokens, None, scaling=SCALING, is_causal=is_causal))
        layer.set_tensors(calibration.result())
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return layer


def tokens(count: int = TOKENS, *, batch: int = BATCH, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(batch, HEADS, count, DIM, generator=generator).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("short", SHORT)
@every
def test_a_short_batch_is_softmax_to_the_last_bit(kind: str, is_causal: bool, short: str, dtype: torch.dtype) -> None:
    layer, parts = build(kind, is_causal, **SHORT[short]), tokens(dtype=dtype)
    for learned in (False, True) if "learned" in vars(layer.config) else (False,):
        if learned:
            layer = build(kind, is_causal, learned=True, **SHORT[short])
        softmax = F.scaled_dot_product_attention(*parts, is_causal=is_causal, scale=SCALING)
        torch.testing.assert_close(layer(*parts), softmax, rtol=0, atol=0)
        longer = tokens(TOKENS + 1, dtype=dtype)
        softmax = F.scaled_dot_product_attention(*longer, is_causal=is_causal, scale=SCALING)
        difference = (layer(*longer) - softmax).abs().amax((0, 1, 3))
        # The border: one token more, and all queries are estimates; in a causal layer with the option the last one.
        still = TOKENS if is_causal else 0
        assert difference[-1] > 1e-3
        assert difference[:still].max() == 0 if still and short == "exact_below" else difference.max() > 1e-3


@every
def test_training_keeps_every_learned_tensor_in_the_graph(kind: str, is_causal: bool) -> None:
    layer = build(kind, is_causal, learned=True, exact_below=TOKENS).train()
    layer(*tokens()).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@every
@settings(max_examples=examples(15))
@given(data=st.data())
def test_a_row_is_what_it_is_alone(kind: str, is_causal: bool, data: Any) -> None:
    """Whatever shares a batch with it, and wherever its padding is: the number of real tokens decides."""
    count, exact_below = data.draw(st.integers(2, 24)), data.draw(st.integers(1, 20))
    where = data.draw(st.sampled_from(["left", "right", "anywhere"]))
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, count), min_size=BATCH, max_size=BATCH)))[:, None]
    place = torch.arange(count)
    if where == "anywhere":
        place = torch.stack([torch.tensor(data.draw(st.permutations(range(count)))) for _ in range(BATCH)])
    mask = place >= count - lengths if where == "left" else place < lengths
    layer = build(kind, is_causal, exact_below=exact_below)
    parts = [z.masked_fill(~mask[:, None, :, None], float("nan")) for z in tokens(count)]
    output = layer(*parts, mask, scaling=SCALING)
    for row, real in enumerate(mask):
        alone = [z[row : row + 1, :, real] for z in parts]
        found, number = output[row : row + 1, :, real], int(lengths[row])
        assert not output[row, :, ~real].any()
        torch.testing.assert_close(found, layer(*alone, scaling=SCALING), rtol=1e-4, atol=2e-5)
        softmax = F.scaled_dot_product_attention(*alone, is_causal=is_causal, scale=SCALING)
        short = min(number, exact_below) if is_causal else number if number <= exact_below else 0
        torch.testing.assert_close(found[:, :, :short], softmax[:, :, :short], rtol=1e-5, atol=1e-5)


@every
def test_what_is_long_is_what_it_was(kind: str, is_causal: bool) -> None:
    """The option changes short rows (causal: first queries) alone, gradients included."""
    mask = torch.arange(TOKENS) < torch.tensor([TOKENS, 12, 5])[:, None]
    parts = [z.double() for z in tokens()]
    weight = torch.randn(BATCH, HEADS, TOKENS, DIM, dtype=torch.float64)
    late = torch.arange(TOKENS) >= 8 if is_causal else torch.tensor([True, True, False])[:, None]
    outputs, gradients = [], []
    for exact_below in (0, 8):
        leaves = [z.clone().requires_grad_() for z in parts]
        output = build(kind, is_causal, exact_below=exact_below).double()(*leaves, mask)
        kept = output * late[..., None] if is_causal else output * late[:, None, :, None]
        outputs.append(kept)
        gradients.append(torch.autograd.grad(kept, leaves, weight))
    for z, expected in zip((outputs[1], *gradients[1]), (outputs[0], *gradients[0]), strict=True):
        torch.testing.assert_close(z, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("queries", [1, 3, 12])
@pytest.mark.parametrize("kind", [kind for kind in CAUSAL_KINDS if kind != "eva"])
def test_the_last_queries_of_a_causal_layer(kind: str, queries: int) -> None:
    layer, (query, key, value) = build(kind, True, exact_below=10), tokens()
    whole = layer(query, key, value)
    torch.testing.assert_close(layer(query[:, :, -queries:], key, value), whole[:, :, -queries:])


@pytest.mark.parametrize("kind", ["favor_plus", "lara", "eva"])
def test_an_image_within_the_option(kind: str) -> None:
    """The convolution of the values is added, and the grid still has to fit."""
    layer = build(kind, learned=True, value_convolution=True, window_size=2, num_global_tokens=1, exact_below=13)
    without = build(kind, learned=True, window_size=2, num_global_tokens=1, exact_below=13)
    parts = tokens(13)
    softmax = F.scaled_dot_product_attention(*parts, scale=SCALING)
    torch.testing.assert_close(without(*parts, grid=(3, 4)), softmax, rtol=0, atol=0)
    assert (layer(*parts, grid=(3, 4)) - softmax).abs().max() > 1e-2
    with pytest.raises(InputError, match="grid of 5 x 4"):
        layer(*parts, grid=(5, 4))


def test_compiled_layers_are_not_compiled_again() -> None:
    """One graph for a shape, whichever rows are short: nothing in it looks at a value."""
    for is_causal in (False, True):
        layer = build("favor_plus", is_causal, exact_below=6)
        counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
        compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=False)
        for lengths in ([16, 3, 2], [16, 16, 16], [1, 0, 6]):
            mask = torch.arange(TOKENS) < torch.tensor(lengths)[:, None]
            torch.testing.assert_close(compiled(*tokens(), mask), layer(*tokens(), mask))
        assert counter.frame_count == 1
        short = tokens(6)
        torch.testing.assert_close(compiled(*short), layer(*short))


class _Alone(torch.nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        output: Tensor = self.layer(query, key, value, mask)
        return output


def test_a_recorded_layer_decides_when_it_runs() -> None:
    layer = build("favor_plus", exact_below=6)
    masks = [torch.arange(TOKENS) < torch.tensor(lengths)[:, None] for lengths in ([16, 3, 2], [16, 8, 16])]
    recorded = torch.jit.trace(_Alone(layer), (*tokens(), masks[0]))
    torch.testing.assert_close(recorded(*tokens(), masks[1]), layer(*tokens(), masks[1]))
    short = torch.ones(BATCH, 6, dtype=torch.bool)
    torch.testing.assert_close(recorded(*tokens(6), short), layer(*tokens(6), short))


def test_ablations_follow_what_is_short() -> None:
    """Within the option no slot has a part; with nothing exact there is no option either."""
    layer, parts = build("favor_plus", exact_below=TOKENS), tokens()
    whole = layer(*parts)
    layer.ablation = WINDOW_ALONE
    torch.testing.assert_close(layer(*parts), whole)
    layer.ablation = SLOTS_ALONE
    assert (layer(*parts) - whole).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "fields"), [("favor_plus", {"kernel": "relu"}), ("eva", {"relative_position": "table"})]
)
def test_what_estimates_something_else_has_no_short_inputs(kind: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"exact_below must be 0 with"):
        get_kind(kind).config_cls(exact_below=8, **fields)


@every
def test_a_shared_sequence_refuses(kind: str, is_causal: bool) -> None:
    assert "exact_below=8" in str(refusal(build(kind, is_causal, exact_below=8), training=False))


@pytest.mark.parametrize("kind", KINDS)
def test_the_dictionary_has_it_only_if_it_is_set(kind: str) -> None:
    """As versions without the field wrote and read it."""
    config_cls = get_kind(kind).config_cls
    assert "exact_below" not in config_cls().to_dict()
    config = config_cls(exact_below=128)
    assert config_from_dict(config.to_dict()) == config
