"""What a memory cannot go on from is refused: nothing of it may go unnoticed."""

from __future__ import annotations

import pytest
import torch
from memory_layers import BATCH, DIM, HEADS, TOKENS, build, get_layer, in_pieces, inputs

from hf_linattn.errors import InputError, UnsupportedError
from hf_linattn.modules.base import LayerShape
from hf_linattn.modules.memory import RecurrentMemory
from hf_linattn.modules.registry import get_kind
from hf_linattn.ops.recurrent.pending import fingerprint


@torch.no_grad()
def test_another_layer_or_batch() -> None:
    layer, parts = get_layer("favor_plus-window"), inputs()
    _, memory = in_pieces(layer, parts, [45])
    with pytest.raises(InputError, match="belongs to another layer: .*window_size=4 and window_size=0"):
        in_pieces(get_layer("favor_plus"), parts, [1], memory=memory)
    with pytest.raises(InputError, match="filled by 'favor_plus', given to 'lara'"):
        in_pieces(get_layer("lara"), parts, [1], memory=memory)
    with pytest.raises(InputError, match="holds 3 sequences; got a batch of 2"):
        in_pieces(layer, [z[:2] for z in parts], [1], memory=memory)
    with pytest.raises(InputError, match="same, new tokens"):
        layer(parts[0][:, :, :1], parts[1], parts[2], memory=memory)


@torch.no_grad()
def test_taking_back_what_is_absorbed() -> None:
    _, memory = in_pieces(get_layer("favor_plus"), inputs(), [45])
    with pytest.raises(UnsupportedError, match="activate_past_recording"):
        memory.crop(1)
    memory.crop(0)


@torch.no_grad()
def test_a_mask_that_changes_its_mind() -> None:
    mask = torch.arange(TOKENS) >= torch.tensor([0, 3, 7])[:, None]
    _, memory = in_pieces(get_layer("lara"), inputs(mask=mask), [20, 25], mask)
    memory.check_past(fingerprint(mask))
    other, moved = mask.clone(), mask.clone()
    other[2, 30] = False
    moved[1, 2], moved[1, 20] = True, False
    for wrong, row in ((other, 2), (moved, 1)):
        with pytest.raises(InputError, match=rf"in rows \[{row}\]"):
            memory.check_past(fingerprint(wrong))
    with pytest.raises(InputError, match=r"in rows \[1, 2\]"):
        memory.check_past(None)
    memory.rows(torch.tensor([2, 0, 2]))
    memory.check_past(fingerprint(mask[[2, 0, 2]]))


@torch.no_grad()
def test_a_mask_of_what_was_all_real() -> None:
    _, memory = in_pieces(get_layer("lara"), inputs(), [45])
    everything = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    memory.check_past(None)
    memory.check_past(fingerprint(everything))
    everything[0, 0] = False
    with pytest.raises(InputError, match=r"in rows \[0\]"):
        memory.check_past(fingerprint(everything))


@torch.no_grad()
def test_the_past_after_cropping() -> None:
    mask = torch.arange(TOKENS) >= torch.tensor([0, 3, 7])[:, None]
    memory = RecurrentMemory()
    memory.is_recording = True
    in_pieces(get_layer("lara"), inputs(mask=mask), [5, 20, 20], mask, memory)
    memory.crop(31)
    memory.check_past(fingerprint(mask[:, :14]))


def test_a_layer_that_sees_later_tokens() -> None:
    layer = get_kind("favor_plus").module_cls(get_kind("favor_plus").config_cls(), LayerShape(HEADS, DIM))
    with pytest.raises(UnsupportedError, match="sees later tokens"):
        layer(*inputs(dtype=torch.float32), memory=RecurrentMemory())


def test_noise_over_several_calls() -> None:
    config = get_kind("lara").config_cls(num_landmarks=6, sample_noise=True, window_size=4)
    layer = get_kind("lara").module_cls(config, LayerShape(HEADS, DIM, is_causal=True)).double()
    layer._buffers.update({k: b.double() for k, b in get_layer("lara-window")._buffers.items() if b is not None})
    layer.invalidate()
    with torch.no_grad(), pytest.raises(UnsupportedError, match="sample_noise"):
        in_pieces(layer.train(), inputs(), [20, 25])


@torch.no_grad()
def test_changed_tensors_are_noticed() -> None:
    """The slots are prepared once for many steps; a layer that got other directions prepares them anew."""
    layer, parts = build("favor_plus"), inputs()
    _, memory = in_pieces(layer, parts, [1] * 45)
    before = memory._recurrence
    in_pieces(layer, parts, [1], memory=memory)
    assert memory._recurrence is before
    layer.projection.mul_(1.1)  # type: ignore[operator, union-attr]
    in_pieces(layer, parts, [1], memory=memory)
    assert memory._recurrence is not before
