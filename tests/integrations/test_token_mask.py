"""The mask over tokens answers what Transformers asks of one, and raises where a model attends by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import VOCAB
from transformers import (
    BloomConfig,
    BloomModel,
    MPNetConfig,
    MPNetModel,
    RoFormerConfig,
    RoFormerModel,
    XGLMConfig,
    XGLMModel,
)

from hf_linattn.errors import UnsupportedError
from hf_linattn.integrations.masks import linattn_mask
from hf_linattn.integrations.seams import causal_mask_function

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
OWN_ATTENTION: dict[str, tuple[Any, Any]] = {
    "bloom": (BloomModel, BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=VOCAB)),
    "xglm": (XGLMModel, XGLMConfig(vocab_size=VOCAB, d_model=32, num_layers=1, attention_heads=4, ffn_dim=48)),
    "roformer": (RoFormerModel, RoFormerConfig(vocab_size=VOCAB, embedding_size=32, **SIZES)),
    "mpnet": (MPNetModel, MPNetConfig(vocab_size=VOCAB, **SIZES)),
}


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_models_that_compute_attention_themselves(name: str, padded: bool) -> None:
    """Their name is refused at once. One that is not found out would take a mask over tokens for one over pairs."""
    cls, config = OWN_ATTENTION[name]
    ids = torch.randint(3, VOCAB, (1, 12))
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0 if padded else 1
    with pytest.raises(UnsupportedError, match=r"computes softmax attention itself.*attn_implementation='eager'"):
        cls._from_config(config, attn_implementation="favor_plus")
    model = cls._from_config(config, attn_implementation="eager").eval()
    assert model(input_ids=ids, attention_mask=mask)[0].isfinite().all()
    model.config._attn_implementation = "favor_plus"  # behind the model's back
    with pytest.raises(UnsupportedError, match=r"works on the attention mask itself.*'eager' or 'sdpa'"):
        model(input_ids=ids, attention_mask=mask)


SEEN = torch.tensor([[True, True, False]])


@pytest.mark.parametrize("tokens", [SEEN, None], ids=["padded", "full"])
def test_mask_answers_only_what_transformers_asks(tokens: torch.Tensor | None) -> None:
    mask: Any = linattn_mask(1, 3, 3, 0, 0, causal_mask_function, tokens)
    assert (mask.ndim, tuple(mask.shape), mask.dtype, str(mask.device)) == (2, (1, 3), torch.bool, "cpu")
    assert not hasattr(mask, "masked_fill")
    ready = mask.to(device="cpu", dtype=torch.bool).contiguous().view(1, -1)
    again = linattn_mask(1, 3, 3, 0, 0, causal_mask_function, ready)
    assert again.tokens is None if tokens is None else torch.equal(again.tokens, tokens)
    states = torch.zeros(1, 1, 3, 2)
    uses: list[Callable[[], Any]] = [
        lambda: torch.zeros(1, 3) + mask,
        lambda: mask * 2,
        lambda: mask[:, None],
        lambda: mask == 0,
        lambda: bool(mask),
        lambda: mask.float(),
        lambda: mask.view(3),
        lambda: torch.zeros(1, 3).masked_fill(mask, 1.0),
        lambda: torch.nn.functional.scaled_dot_product_attention(states, states, states, attn_mask=mask),
    ]
    for use in uses:
        with pytest.raises(UnsupportedError, match="computes attention on its own"):
            use()
