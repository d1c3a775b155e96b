"""`extend_positions`: the longer table, everything that follows from its length, and what cannot be extended."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import BERT, BY_NAME, GPT2, VIT, VOCAB, checkpoint_activations, converted, gpt2_config, logits, ready
from torch import Tensor, nn
from transformers import (
    AutoModel,
    BertConfig,
    DistilBertConfig,
    DistilBertModel,
    EncoderDecoderModel,
    GenerationConfig,
    GPT2LMHeadModel,
    PreTrainedModel,
)

import hf_linattn
from hf_linattn import extend_positions
from hf_linattn.errors import ConfigError, InputError, UnsupportedError
from hf_linattn.hub import render_card
from hf_linattn.models import COUNTERPARTS

OLD, NEW = 64, 150  # two seams when tiled, the last copy incomplete
METHODS = ["tile", "interpolate"]
CASES = [pytest.param(BY_NAME[name], id=name) for name in ("bert-classifier", "bert-mlm", "gpt2")]
TEXT_CLASSES = [cls for cls in COUNTERPARTS if not cls.__name__.startswith("ViT")]


def reverted(case: Any, kind: str = "favor_plus") -> Any:
    return hf_linattn.revert(converted(case, kind))


FORMS: dict[str, Callable[[Any], Any]] = {
    "stock": lambda case: case.build(),
    "favor_plus": lambda case: converted(case, "favor_plus"),
    "favor_sharp": lambda case: converted(case, "favor_sharp"),
    "lara": lambda case: converted(case, "lara"),
    "eva": lambda case: converted(case, "eva"),
    "mixed": lambda case: converted(case, "favor_plus", layers=[1]),
    "reverted": reverted,
}


def table_of(model: Any) -> nn.Embedding:
    base = model.base_model
    return base.wpe if hasattr(base, "wpe") else base.embeddings.position_embeddings


def tokens(length: int, batch: int = 2) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(length))


def expected(old: Tensor, new: int, method: str) -> Tensor:
    if method == "tile":
        return torch.cat([old] * (new // len(old) + 1))[:new]
    wide = nn.functional.interpolate(old.double().T[None], size=new, mode="linear", align_corners=True)
    return wide[0].T


def snapshot(model: Any) -> tuple[Any, ...]:
    state = {name: (id(tensor), tensor.clone() if not tensor.is_meta else None) for name, tensor in state_of(model)}
    return state, model.config.to_dict()


def state_of(model: Any) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


# -- what it does ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_longer_inputs(case: Any, method: str, dtype: torch.dtype, form: str, tmp_path: Path) -> None:
    model = FORMS[form](case).to(dtype)
    cls, table = type(model), table_of(model)
    weight, old = table.weight, table.weight.detach().clone()
    short, long = tokens(OLD), tokens(NEW)
    before = logits(model, input_ids=short)
    with pytest.raises((IndexError, RuntimeError, InputError)):
        logits(model, input_ids=long)

    assert extend_positions(model, NEW, method=method) is model
    assert type(model) is cls
    assert table_of(model) is table
    assert table.weight is weight
    assert (table.num_embeddings, *weight.shape, weight.dtype) == (NEW, NEW, 32, dtype)
    assert model.config.max_position_embeddings == NEW
    want = expected(old, NEW, method)
    if method == "tile":
        assert torch.equal(weight, want)
        assert torch.equal(logits(model, input_ids=short), before)
    else:
        error = (weight.detach().double() - want).abs()
        assert float((error / want.abs().clamp(min=1e-2)).max()) < (1e-3 if dtype == torch.float32 else 2**-7)
        assert torch.equal(weight[[0, -1]], old[[0, -1]])
    after = logits(model, input_ids=long)
    assert bool(after.isfinite().all())
    with pytest.raises((IndexError, RuntimeError, InputError)):
        logits(model, input_ids=tokens(NEW + 1))

    model.save_pretrained(tmp_path)
    loaded, info = case.auto.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert type(loaded) is cls
    assert table_of(loaded).weight.shape == (NEW, 32)
    assert loaded.config.max_position_embeddings == NEW
    assert torch.equal(logits(loaded.eval(), input_ids=long), after)


def test_interpolation_is_in_float32() -> None:
    """Each row of a half-precision table is the rounded value of the exact one, not of a rounded sum."""
    model = GPT2.build(n_positions=5).to(torch.bfloat16)
    old = table_of(model).weight.detach().clone()
    extend_positions(model, 8192, method="interpolate")
    exact = expected(old, 8192, "interpolate").bfloat16()
    assert float((table_of(model).weight != exact).float().mean()) < 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_a_table_of_one_row_and_no_change(method: str) -> None:
    model = GPT2.build(n_positions=1)
    row = table_of(model).weight.detach().clone()
    extend_positions(model, 3, method=method)
    assert torch.equal(table_of(model).weight, row.expand(3, -1))
    weight = table_of(model).weight
    weight.grad = gradient = torch.ones_like(weight)
    before = snapshot(model)
    assert extend_positions(model, 3, method=method) is model
    assert repr(snapshot(model)) == repr(before)
    assert weight.grad is gradient


def test_tiles_unless_told_otherwise() -> None:
    model = GPT2.build()
    old = table_of(model).weight.detach().clone()
    assert torch.equal(table_of(extend_positions(model, NEW)).weight, expected(old, NEW, "tile"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cls", TEXT_CLASSES, ids=lambda cls: cls.__name__)
def test_extended_heads_of_every_class(cls: type[PreTrainedModel], method: str, tmp_path: Path) -> None:
    """Stock and converted, saved and loaded through the class; ties of word embeddings survive."""
    case = GPT2 if cls.__name__.startswith("GPT2") else BERT
    for convert in (False, True):
        model = cls(case.config()).eval()
        if convert:
            model = hf_linattn.convert(model, case.settings("favor_plus"))
        outputs = model.get_output_embeddings()
        tied = outputs is not None and outputs.weight is model.get_input_embeddings().weight
        extend_positions(model, NEW, method=method)
        assert tied == (outputs is not None and outputs.weight is model.get_input_embeddings().weight)
        ids = tokens(NEW, batch=1)
        inputs = {"input_ids": ids[:, None].expand(-1, 2, -1) if "MultipleChoice" in cls.__name__ else ids}
        path = tmp_path / str(convert)
        model.save_pretrained(path)
        loaded = type(model).from_pretrained(path).eval()
        state = loaded.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        # Not bit-equal: a product with one column (multiple choice) depends on where a tensor lies in memory.
        assert torch.allclose(logits(loaded, **inputs), logits(model, **inputs), atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_conversion_before_and_after(case: Any, method: str) -> None:
    """Extending commutes with convert and with revert."""
    settings, ids = case.settings("favor_plus"), {"input_ids": tokens(NEW)}
    first = hf_linattn.convert(extend_positions(case.build(), NEW, method=method), settings)
    second = extend_positions(hf_linattn.convert(case.build(), settings), NEW, method=method)
    assert torch.equal(logits(first, **ids), logits(second, **ids))
    stock = extend_positions(case.build(), NEW, method=method)
    assert torch.equal(logits(hf_linattn.revert(second), **ids), logits(stock, **ids))
    assert second.config.max_position_embeddings == NEW


@pytest.mark.parametrize("form", ["stock", "favor_plus"])
def test_bert_buffers(form: str) -> None:
    """Default positions and segments are as long as the table, and no part of checkpoints."""
    model = FORMS[form](BERT)
    embeddings = model.base_model.embeddings
    names = set(model.state_dict())
    kinds = {name: (buffer.dtype, buffer.device) for name, buffer in embeddings.named_buffers()}
    extend_positions(model, NEW)
    assert torch.equal(embeddings.position_ids, torch.arange(NEW)[None])
    assert torch.equal(embeddings.token_type_ids, torch.zeros(1, NEW, dtype=torch.long))
    assert {name: (buffer.dtype, buffer.device) for name, buffer in embeddings.named_buffers()} == kinds
    assert set(model.state_dict()) == names
    ids = tokens(NEW)
    explicit = {"token_type_ids": torch.zeros_like(ids), "position_ids": torch.arange(NEW)[None]}
    assert torch.equal(logits(model, input_ids=ids, **explicit), logits(model, input_ids=ids))


# -- what follows the maximum ---------------------------------------------------------------------------------------
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


# -- what it refuses ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("number", "message"),
    [
        (OLD - 1, "at least the 64 positions.*got 63"),
        (0, "at least the 64"),
        (-1, "at least the 64"),
        (150.0, r"integer.*150\.0 \(float\)"),
        ("150", r"integer.*'150' \(str\)"),
        (True, "integer.*True"),
        (None, "integer.*None"),
        (torch.tensor(150.0), "integer"),
    ],
)
def test_impossible_numbers_of_positions(number: Any, message: str) -> None:
    model = GPT2.build()
    before = snapshot(model)
    with pytest.raises(ConfigError, match=message):
        extend_positions(model, number)
    assert repr(snapshot(model)) == repr(before)


def test_unknown_method_of_extension() -> None:
    with pytest.raises(ConfigError, match=r"\['tile', 'interpolate'\]; got 'interpolation'.*mean 'interpolate'"):
        extend_positions(GPT2.build(), NEW, method="interpolation")
    with pytest.raises(ConfigError, match="got None"):
        extend_positions(GPT2.build(), NEW, method=None)  # type: ignore[arg-type]


def _meta() -> Any:
    with torch.device("meta"):
        return GPT2LMHeadModel(gpt2_config())


def _offloaded() -> Any:
    return pytest.importorskip("accelerate").cpu_offload(GPT2.build(), execution_device="cpu")


def _parametrized() -> Any:
    model = GPT2.build()
    nn.utils.parametrizations.weight_norm(model.transformer.wpe)
    return model


def _wrong_config() -> Any:
    model = GPT2.build()
    model.config.n_positions = OLD + 1
    return model


def _subclass() -> Any:
    model = GPT2.build()
    model.transformer.wpe.weight = nn.Parameter(torch.Tensor._make_subclass(Sharded, torch.zeros(OLD, 32)))
    return model


class Sharded(Tensor):
    """In place of a DTensor, which needs a process group."""


REFUSED = {
    "vit": (VIT.build, "interpolate_pos_encoding"),
    "distilbert": (
        lambda: DistilBertModel(DistilBertConfig(vocab_size=9, dim=8, n_heads=2, n_layers=1, hidden_dim=8)),
        "'distilbert'",
    ),
    "class": (lambda: GPT2LMHeadModel, "the class GPT2LMHeadModel"),
    "wrapped": (lambda: nn.DataParallel(GPT2.build()), "DataParallel.*before it is wrapped"),
    "compiled": (lambda: torch.compile(GPT2.build()), "OptimizedModule"),
    "relative": (
        lambda: BERT.stock(BertConfig(**{**BERT.config().to_dict(), "position_embedding_type": "relative_key"})),
        "'relative_key'",
    ),
    "meta": (_meta, "meta device"),
    "offloaded": (_offloaded, "before offloading"),
    "parametrized": (_parametrized, "got ParametrizedEmbedding"),
    "config": (_wrong_config, r"\(65, 32\) by the config; got a Tensor of shape \(64, 32\)"),
    "sharded": (_subclass, "got a Sharded"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_models(name: str) -> None:
    build, message = REFUSED[name]
    model = build()
    before = snapshot(copy.copy(model)) if isinstance(model, PreTrainedModel) else None
    with pytest.raises(UnsupportedError, match=message):
        extend_positions(model, 1000)
    if before is not None:
        assert repr(snapshot(model)) == repr(before)
