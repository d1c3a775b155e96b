"""What a model is before any weights are loaded, on every road to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import KINDS
from heads import CLASSES, Stock, build, case_of, convert, every_class, every_class_and_family, settings
from transformers import GenerationMixin

import hf_linattn
from hf_linattn.models import COUNTERPARTS


def config_for(stock: Stock, kind: str, **changes: Any) -> Any:
    if stock.__name__ == "BertLMHeadModel":
        changes = {"is_decoder": True, **changes}
    values = {**case_of(stock).config(**changes).to_dict(), "linear_attention": settings(stock, kind)}
    values.pop("model_type")
    return COUNTERPARTS[stock].config_class(**values)


def state(model: Any) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@every_class_and_family()
def test_missing_weights_are_initialised(stock: Stock, kind: str) -> None:
    """From the constructor or from no weights: the attention to the last bit, the rest as in the stock model."""
    cls, config = COUNTERPARTS[stock], config_for(stock, kind)
    expected = {name: tensor.detach() for name, tensor in state(build(stock)).items()}
    direct = cls(config)
    filler = [torch.full((4096,), float("nan")) for _ in range(50)]
    del filler
    loaded = cls.from_pretrained(None, config=config, state_dict={})
    for name, tensor in state(direct).items():
        found = state(loaded)[name]
        assert not found.is_meta
        assert found.dtype == tensor.dtype
        assert torch.isfinite(found.float()).all(), name
        if "linattn" in name:
            assert torch.equal(found, tensor), name
        elif found.numel() >= 50:
            wanted = pytest.approx(float(expected[name].float().std()), rel=0.35, abs=1e-3)
            assert float(tensor.detach().float().std()) == wanted, name
            assert float(found.detach().float().std()) == wanted, name


@every_class_and_family()
def test_the_range_of_the_config_is_kept(stock: Stock, kind: str) -> None:
    """With a range of almost 0 every weight is 0 or 1, but the tables that are no weights."""
    model = COUNTERPARTS[stock](config_for(stock, kind, initializer_range=1e-10))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "linattn" not in name:
            assert {round(value, 6) for value in parameter.detach().flatten().tolist()} <= {0.0, 1.0}, name


@every_class_and_family()
def test_buffers_can_be_initialised_again(stock: Stock, kind: str) -> None:
    model = COUNTERPARTS[stock](config_for(stock, kind))
    before = {name: tensor.clone() for name, tensor in state(model).items()}
    with torch.no_grad():
        for tensor in state(model).values():
            tensor.fill_(42)
    for module in model.modules():
        module._is_hf_initialized = False  # type: ignore[assignment]
    for parameter in model.parameters():
        parameter._is_hf_initialized = False  # type: ignore[attr-defined]
    model.initialize_weights()
    for name, tensor in state(model).items():
        if name in dict(model.named_buffers()) or "linattn" in name:
            assert torch.equal(tensor, before[name]), name
        else:
            assert not (tensor == 42).all(), name


@every_class_and_family()
def test_on_the_meta_device(stock: Stock, kind: str) -> None:
    """Also of full size: nothing is computed, nothing is allocated."""
    cls = COUNTERPARTS[stock]
    with torch.device("meta"):
        for config in (config_for(stock, kind), cls.config_class(linear_attention=kind)):
            assert all(tensor.is_meta for tensor in state(cls(config)).values())


@every_class()
def test_every_tensor_is_a_parameter_or_a_buffer(stock: Stock) -> None:
    """So that casts, moves and copies reach it."""
    for kind in KINDS:
        model = hf_linattn.convert(build(stock), settings(stock, kind))
        for name, module in model.named_modules():
            if "linattn" in name:
                loose = [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)]
                assert not loose, (name, loose)


@every_class()
def test_class_attributes(stock: Stock) -> None:
    """What Transformers reads from a class is what the stock class says."""
    cls = COUNTERPARTS[stock]
    assert issubclass(cls, stock)
    names = (
        "base_model_prefix",
        "main_input_name",
        "input_modalities",
        "supports_gradient_checkpointing",
        "_tied_weights_keys",
        "_no_split_modules",
        "_keys_to_ignore_on_load_unexpected",
        "_tp_plan",
    )
    for name in names:
        assert getattr(cls, name, None) == getattr(stock, name, None), name
    assert issubclass(cls, GenerationMixin) == issubclass(stock, GenerationMixin)
    assert cls.can_generate() == stock.can_generate()


def test_tiny_models_stay_tiny() -> None:
    """A model of these tests has less than 100000 numbers, so that the tests stay cheap."""
    for stock, kind in zip(CLASSES, KINDS * 5, strict=False):
        assert sum(tensor.numel() for tensor in state(convert(stock, kind)).values()) < 100_000
