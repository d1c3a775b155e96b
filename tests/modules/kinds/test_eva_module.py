"""EVA's layer with learned summaries: settings, tensors, refusals, generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import BERT, GPT2, VOCAB
from transformers import AutoModel

import hf_linattn
from hf_linattn import EvaConfig
from hf_linattn.errors import ConfigError, LinAttnError
from hf_linattn.modules.base import LayerShape
from hf_linattn.modules.defaults import resolve
from hf_linattn.modules.kinds.eva import EvaAttention

LEARNED = {"key_pooling", "value_pooling", "key_adapter", "query_adapter", "far_offset", "far_slope", "key_slope"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("proposals", "sum"),
        ("weighting", "spread"),
        ("chunking", "published"),
        ("proposal_map", "residual"),
        ("sample_noise", True),
        ("noise_scale", "published"),
        ("conventions", "published"),
    ],
)
def test_settings_of_control_variates_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"EvaConfig\.{field} must be .* with learned=True"):
        EvaConfig(learned=True, **{field: value})


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
def test_settings_are_filled_in_and_come_back(family: str) -> None:
    config = resolve(EvaConfig(learned=True), family)
    assert EvaConfig.from_dict(config.to_dict()) == config
    assert "learned" not in EvaConfig().to_dict()


@pytest.mark.parametrize("is_causal", [False, True])
def test_tensors(is_causal: bool) -> None:
    layer = EvaAttention(EvaConfig(learned=True), LayerShape(2, 4, is_causal=is_causal))
    assert {name for name, _ in layer.named_parameters()} == LEARNED
    assert not any(parameter.any() for parameter in layer.parameters())
    table = EvaConfig(learned=True, relative_position="table", window_size=4)
    names = {name for name, _ in EvaAttention(table, LayerShape(2, 4, is_causal=is_causal)).named_parameters()}
    assert names == {*LEARNED, "relative_table"}


def test_native_mode_refuses() -> None:
    model = AutoModel.from_config(BERT.config(attention_probs_dropout_prob=0.0), attn_implementation="eva")
    model.config.linear_attention = {"learned": True}
    with pytest.raises(LinAttnError, match="native mode has no parameters"):
        model(torch.randint(3, VOCAB, (1, 8)))


def test_generation_through_the_cache_is_that_without() -> None:
    model = hf_linattn.convert(GPT2.build(), EvaConfig(learned=True, window_size=4, chunk_size=2)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".linattn." in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    ids = torch.randint(3, VOCAB, (2, 13), generator=generator)
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found, expected = (model.generate(ids, use_cache=cache, **options) for cache in (True, False))
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)
