"""What else depends on values: raised when a graph runs, or before it."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from caches import given_cache
from cases import GPT2, ModelCase, converted
from torch import Tensor
from transformers import StaticCache

from hf_linattn.errors import InputError
from hf_linattn.functional import eva_attention


def test_mask_over_a_grid() -> None:
    def attend(q: Tensor, mask: Tensor) -> Tensor:
        return eva_attention(q, q, q, key_mask=mask, grid=(4, 4), window_size=2, num_chunks=4, chunk_size=2)

    torch._dynamo.reset()
    call = torch.compile(attend, backend="eager", fullgraph=True)
    query, mask = torch.randn(1, 2, 16, 4), torch.ones(1, 16, dtype=torch.bool)
    torch.testing.assert_close(call(query, mask), attend(query, mask))
    mask[0, 3] = False
    with pytest.raises(RuntimeError, match="A mask over a 2-D grid must be all True"):
        call(query, mask)


def test_directions_that_change_under_a_cache() -> None:
    """A step that is compiled says so too."""
    torch._dynamo.reset()
    small = {"n_layer": 1, "use_cache": True}
    case = ModelCase(**{**vars(GPT2), "config": lambda **more: GPT2.config(**{**small, **more})})
    model = converted(case, "favor_plus", redraw_interval=1)
    call = torch.compile(model, backend="eager")
    ids = torch.randint(3, 60, (2, 12))
    layer = next(module for module in model.modules() if hasattr(module, "set_training_step"))

    def begun() -> dict[str, object]:
        cache = given_cache(StaticCache(config=model.config, max_cache_len=32))
        model(ids, **cache, attention_mask=torch.ones_like(ids))
        return cache

    mask = torch.ones(2, 13, dtype=torch.long)
    with torch.no_grad():
        cache = begun()
        call(ids[:, :1], **cache, attention_mask=mask)
        layer.set_training_step(5)
        with pytest.raises((InputError, RuntimeError), match="have changed"):
            call(ids[:, :1], **cache, attention_mask=torch.ones(2, 14, dtype=torch.long))
        found, expected = (some(ids[:, :1], **begun(), attention_mask=mask)[0] for some in (call, model))
    torch.testing.assert_close(found, expected)
