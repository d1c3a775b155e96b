"""Models whose sequences processes share, beside one process with whole rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import VOCAB, bert_config, gpt2_config
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import BertConfig

import hf_linattn
import hf_linattn.training.shared_forward as shared_forward
from hf_linattn.distributed.collectives import SequenceGroup
from hf_linattn.modules.registry import get_kind

WINDOW = 4


# -- processes --------------------------------------------------------------------------------------------------------
def mesh(**sizes: int) -> DeviceMesh:
    """`mesh(dp=2, cp=2)`."""
    return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))


# -- the slow path ----------------------------------------------------------------------------------------------------
def attend_whole(layer: Any, inputs: Any, group: SequenceGroup) -> Tensor:
    """`attend_across`, slowly: all processes compute whole rows, and each takes its own part of the result."""

    def whole(x: Tensor, dim: int) -> Tensor:
        return torch.cat(list(group.gather(x).unbind(0)), dim)

    tokens = [whole(z, 2) for z in (inputs.query, inputs.key, inputs.value)]
    mask = None if inputs.key_mask is None else whole(inputs.key_mask.int(), 1).bool()
    every = replace(inputs, query=tokens[0], key=tokens[1], value=tokens[2], key_mask=mask)
    return layer.compute(layer.config, layer.tensors(), every).chunk(group.size, 2)[group.rank]


@contextmanager
def attention(how: str) -> Iterator[None]:
    """With "slow" in place of what the layers exchange; with "fast" the library as it is."""
    with pytest.MonkeyPatch.context() as patch:
        if how == "slow":
            patch.setattr(shared_forward, "attend_across", attend_whole)
        yield


# -- models -----------------------------------------------------------------------------------------------------------
# What the processes cannot share in training is switched off.
SETTINGS: dict[str, dict[str, Any]] = {
    "favor_plus": {"num_heavy_keys": 0},
    "favor_sharp": {"num_heavy_keys": 0},
    "lara": {"num_heavy_keys": 0, "proposal_source": "calibrated", "sample_noise": False},
    "eva": {"sample_noise": False},
}


def settings(kind: str, **changes: Any) -> Any:
    """Small settings of a kind."""
    shared = {"window_size": WINDOW, "num_global_tokens": 0, "slot_dropout": 0.0}
    return get_kind(kind).config_cls(**{**get_kind(kind).example, **shared, **SETTINGS[kind], **changes})


def model(stock: Any, kind: str = "favor_plus", layers: list[int] | None = None, **changes: Any) -> Any:
    """A tiny converted model in float64 and training, without dropout, calibrated where it has to be.

    Calibration is shared by the processes of a group: one process has to do it, before they start.

    Args:
        changes: Of the kind's settings.
    """
    torch.manual_seed(0)
    causal = "GPT2" in stock.__name__ or stock.__name__ == "BertLMHeadModel"
    if stock.config_class is BertConfig:
        config = bert_config(hidden_dropout_prob=0.0, is_decoder=causal)
    else:
        config = gpt2_config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    made = hf_linattn.convert(stock(config), settings(kind, **changes), layers=layers)
    if hf_linattn.needs_calibration(made):
        hf_linattn.calibrate(made, [{"input_ids": ids(4, 40, seed=9)}])
    return made.double().train()


def ids(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def masked(tokens: int, *real: list[range]) -> Tensor:
    """`[rows, tokens]`, 1 in the given columns of each row."""
    mask = torch.zeros(len(real), tokens, dtype=torch.long)
    for row, columns in enumerate(real):
        for each in columns:
            mask[row, list(each)] = 1
    return mask


# Name -> mask of two rows of 29 tokens: no multiple of the processes, nor of the window.
MASKS = {
    "none": None,
    "ragged": masked(29, [range(29)], [range(11)]),
    "left": masked(29, [range(8, 29)], [range(29)]),
    "holes": masked(29, [range(5), range(9, 27)], [range(1, 4), range(12, 29)]),
    "short": masked(29, [range(6)], [range(2, 9)]),
}


def batch(mask: str = "ragged", seed: int = 0) -> dict[str, Tensor]:
    """Two rows, where real tokens have labels, but for some: not as many in each part."""
    found = {"input_ids": ids(2, 29, seed)}
    labels = found["input_ids"].clone()
    labels[:, 3:17:2] = -100
    if MASKS[mask] is not None:
        found["attention_mask"] = MASKS[mask]
        labels[MASKS[mask] == 0] = -100
    return {**found, "labels": labels}


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_close(ours: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-6) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
