"""What a memory keeps for `exact_below`, beside the tests that all recurrent forms share (`memory_layers.py`)."""

from __future__ import annotations

import pytest
import torch
from memory_layers import CASES, SCALING, get_layer, in_pieces, inputs

from hf_linattn.modules.memory import RecurrentMemory

NAMES = [name for name in CASES if name.endswith("exact")]


@pytest.mark.parametrize("sizes", [[3, 1, 1, 8], [3, 10], [3, 1, 9]], ids=str)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_rows_that_are_even_after_a_choice(name: str, sizes: list[int]) -> None:
    """Rows of different lengths, then one of them alone several times: as many tokens each, but fewer than places."""
    layer, tokens = get_layer(name), 6 + sum(sizes)
    mask = torch.arange(tokens) >= torch.tensor([0, 4, 2])[:, None]
    parts, index = inputs(tokens, mask=mask), torch.tensor([1, 1])
    whole = layer(*parts, mask, scaling=SCALING)[index]
    memory = RecurrentMemory()
    in_pieces(layer, [z[:, :, :6] for z in parts], [6], mask[:, :6], memory)
    memory.rows(index)
    read, _ = in_pieces(layer, [z[index][:, :, 6:] for z in parts], sizes, None, memory)
    torch.testing.assert_close(read, whole[:, :, 6:], rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_first_tokens_are_kept_until_every_row_has_had_them(name: str) -> None:
    layer, parts = get_layer(name), inputs()
    exact_below = layer.config.exact_below
    _, memory = in_pieces(layer, parts, [exact_below - 1])
    assert memory.state.key.shape[2] == memory.state.value.shape[2] == exact_below - 1
    in_pieces(layer, [z[:, :, exact_below:] for z in parts], [1], None, memory)
    assert not memory.state.key.numel()
    static = RecurrentMemory(static_tokens=45)
    in_pieces(layer, parts, [exact_below + 1], None, static)
    assert static.state.key.shape[2] == exact_below
