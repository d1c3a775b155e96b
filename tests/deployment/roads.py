"""Models as exporters take them: tensors in, a tensor out, and no cache among the results."""

from __future__ import annotations

from typing import Any

import torch
from cases import BY_NAME, GPT2, KINDS, MODES, VIT, ModelCase, largest, native, supported
from torch import Tensor, nn

CLASSIFIER = BY_NAME["bert-classifier"]
QUICK = {("bert-classifier", "eva"), ("gpt2", "favor_plus"), ("vit", "lara"), ("bert-classifier", "favor_plus")}


class Road(nn.Module):
    """The first result of a model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, pixel_values: Any = None
    ) -> Tensor:
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "pixel_values": pixel_values,
        }
        return self.model(**{name: value for name, value in given.items() if value is not None})[0]


def road(case: ModelCase, kind: str, mode: Any, **settings: Any) -> Road:
    return Road(mode(case, kind, **settings)).eval()


def roads(*, quick: bool = True) -> list[Any]:
    """Models x kinds x modes; those of the quick run differ in everything."""
    import pytest

    return [
        pytest.param(
            case,
            kind,
            mode.values[0],
            id=f"{case.name}-{kind}-{mode.id}",
            marks=[] if not quick or (case.name, kind) in QUICK else [pytest.mark.slow],
        )
        for case in (CLASSIFIER, GPT2, VIT)
        for kind in KINDS
        for mode in MODES
        if supported(kind, case, native=mode.values[0] is native)
    ]


def padded(batch: int = 2, tokens: int = 40, *, padding: int = 9) -> dict[str, Tensor]:
    """The last row has padding at its end."""
    ids = torch.randint(3, 60, (batch, tokens), generator=torch.Generator().manual_seed(tokens))
    mask = torch.ones_like(ids)
    if padding:
        mask[-1, -padding:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def check(call: Any, model: Road, *batches: dict[str, Tensor]) -> None:
    """The same numbers as without the road, for every batch."""
    for batch in batches:
        with torch.no_grad():
            assert largest(call(**batch) - model(**batch)) < 1e-5, {k: tuple(v.shape) for k, v in batch.items()}


def gradients(call: Any, owner: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the parameters of `owner`, by name, as copies: a program and the model that it was made of share them."""
    owner.zero_grad()
    call(**batch).sin().sum().backward()
    return {name: p.grad.clone() for name, p in owner.named_parameters() if p.grad is not None}


def check_gradients(call: Any, model: Road, batch: dict[str, Tensor]) -> None:
    """The parameters of a recorded program get the gradients of the model's."""
    found, expected = gradients(call, call, batch), gradients(model, model, batch)
    assert found.keys() == expected.keys()
    scale = max(float(grad.abs().max()) for grad in expected.values())
    assert scale > 0
    for name, grad in expected.items():
        assert largest(found[name] - grad) < 1e-5 * scale, name
