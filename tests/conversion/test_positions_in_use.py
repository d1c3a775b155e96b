"""What follows the length of an extended table: configs, generation, cards, training, hooks, devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import BERT, GPT2, checkpoint_activations, converted, gpt2_config, logits, ready
from position_tables import CASES, FORMS, NEW, OLD, table_of, tokens
from torch import Tensor, nn
from transformers import AutoModel, EncoderDecoderModel, GenerationConfig, GPT2LMHeadModel

import hf_linattn
from hf_linattn import extend_positions
from hf_linattn.errors import UnsupportedError
from hf_linattn.hub import render_card


@pytest.mark.parametrize("form", ["stock", "favor_plus", "eva"])
def test_generation_beyond_the_old_table(form: str) -> None:
    """`generate` goes on beyond the old maximum, with its cache as without one."""
    model = FORMS[form](GPT2)
    model.generation_config = GenerationConfig(**{**model.generation_config.to_dict(), "max_length": OLD})
    extend_positions(model, NEW)
    assert model.generation_config.max_length == NEW
    prompt = tokens(OLD - 4)
    out = model.generate(prompt, do_sample=False)
    assert out.shape == (2, NEW)
    assert torch.equal(out, model.generate(prompt, do_sample=False, use_cache=False))


def test_another_max_length_is_kept() -> None:
    model = GPT2.build()
    model.generation_config.max_length = OLD - 1
    assert extend_positions(model, NEW).generation_config.max_length == OLD - 1


def test_configs_follow_the_table() -> None:
    """The config object is the same one; numbers of older checkpoints follow; the attribute map holds."""
    model = GPT2LMHeadModel(gpt2_config(n_ctx=OLD))
    config = model.config
    extend_positions(model, np.int64(NEW))  # type: ignore[arg-type]
    assert model.config is config is model.transformer.config
    values = config.to_dict()
    assert values["n_positions"] == values["n_ctx"] == NEW
    assert "max_position_embeddings" not in values
    assert type(config.n_positions) is int


def test_part_of_a_composite_model(tmp_path: Path) -> None:
    model = EncoderDecoderModel(encoder=AutoModel.from_config(BERT.config()), decoder=GPT2.build()).eval()
    with pytest.raises(UnsupportedError, match=r"model\.encoder, model\.decoder"):
        extend_positions(model, NEW)
    extend_positions(model.encoder, NEW)
    model.save_pretrained(tmp_path)
    loaded = EncoderDecoderModel.from_pretrained(tmp_path)
    assert table_of(loaded.encoder).num_embeddings == NEW
    assert table_of(loaded.decoder).num_embeddings == OLD


def test_model_card_of_an_extended_model() -> None:
    assert f"of {NEW} positions" in render_card(extend_positions(converted(GPT2, "eva"), NEW))


@pytest.mark.parametrize("kind", ["favor_plus", "eva"])
def test_positions_up_to_16k_tokens(kind: str) -> None:
    model = extend_positions(hf_linattn.convert(GPT2.build(n_layer=1), kind), 16384)
    ids = tokens(16384, batch=2)
    with torch.no_grad():
        out = model(ids, use_cache=False, logits_to_keep=2).logits
        shorter = model(ids[:, :-1], use_cache=False, logits_to_keep=1).logits
    assert bool(out.isfinite().all())
    assert torch.allclose(out[:, :1], shorter, atol=1e-4)


# -- training and devices -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", CASES)
def test_training_of_an_extended_model(case: Any) -> None:
    """Gradients reach every row, with gradient checkpointing too; a frozen table stays frozen."""
    model = converted(case, "favor_plus")
    weight = table_of(model).weight
    optimizer = torch.optim.SGD([weight], lr=1.0)
    logits_of(model, tokens(OLD)).sum().backward()
    with torch.inference_mode():
        extend_positions(model, NEW)
    assert weight.grad is None
    model.train()
    checkpoint_activations(model)
    before = weight.detach().clone()
    logits_of(model, tokens(NEW)).square().sum().backward()
    optimizer.step()  # no state yet: it holds the same parameter
    assert bool((weight != before).any(dim=1).all())

    started = torch.optim.AdamW([weight])
    started.step()
    extend_positions(model, NEW + 1)
    logits_of(model, tokens(NEW)).square().sum().backward()
    with pytest.raises(RuntimeError, match="size"):  # its state has the old shape: not silently another table
        started.step()

    frozen = case.build()
    table_of(frozen).weight.requires_grad_(False)
    assert not table_of(extend_positions(frozen, NEW)).weight.requires_grad


def logits_of(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids)[0]


def test_options_of_the_table_are_kept() -> None:
    """Also hooks on the module, such as those by which accelerate places layers."""
    hooks = pytest.importorskip("accelerate.hooks")
    seen = []

    class Count(hooks.ModelHook):  # type: ignore[misc, name-defined]
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            seen.append(module)
            return args, kwargs

    model = GPT2.build()
    table = model.transformer.wpe
    table.padding_idx = 2
    hooks.add_hook_to_module(table, Count())
    extend_positions(model, NEW)
    logits(model, input_ids=tokens(NEW))
    assert seen == [table]
    assert table.padding_idx == 2
    logits_of(model, tokens(NEW)).square().sum().backward()
    assert not bool(table.weight.grad[2].any())
    assert bool(table.weight.grad[OLD + 2].any())


def test_dispatched_and_compiled() -> None:
    accelerate = pytest.importorskip("accelerate")
    dispatched = accelerate.dispatch_model(GPT2.build(), {"": "cpu"}, force_hooks=True)
    plain, ids = extend_positions(GPT2.build(), NEW), tokens(NEW)
    assert torch.equal(logits(extend_positions(dispatched, NEW), input_ids=ids), logits(plain, input_ids=ids))
    model = GPT2.build()
    model.compile(backend="eager")
    logits(model, input_ids=tokens(OLD))
    assert torch.allclose(logits(extend_positions(model, NEW), input_ids=ids), logits(plain, input_ids=ids), atol=1e-5)


def test_calibration_afterwards() -> None:
    """What the docstring advises works: calibrate again on long inputs."""
    model = extend_positions(converted(GPT2, "favor_sharp"), NEW)
    short = logits(model, input_ids=tokens(NEW))
    hf_linattn.calibrate(model, [{"input_ids": tokens(NEW, batch=4)}])
    assert not torch.equal(logits(model, input_ids=tokens(NEW)), short)
    assert not hf_linattn.needs_calibration(ready(model))
