"""`forward` called directly, as libraries do, is as good as the call; and it looks like that of the stock model."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from cases import BERT, GPT2, KINDS, VIT, ModelCase, converted, logits, supported
from transformers import ViTModel

import hf_linattn
from hf_linattn.errors import ConfigError, InputError, LinAttnError
from hf_linattn.models import COUNTERPARTS

MATRIX = [
    pytest.param(kind, case, id=f"{kind}-{case.name}")
    for kind in KINDS
    for case in (BERT, GPT2, VIT)
    if supported(kind, case)
]
ROADS = [pytest.param(lambda model: model, id="call"), pytest.param(lambda model: model.forward, id="forward")]


@pytest.mark.parametrize(("kind", "case"), MATRIX)
def test_the_same_result(kind: str, case: ModelCase) -> None:
    model = converted(case, kind)
    with torch.no_grad():
        assert torch.equal(model.forward(**case.inputs())[0], logits(model, **case.inputs()))


@pytest.mark.parametrize(("kind", "case"), MATRIX)
def test_the_same_errors(kind: str, case: ModelCase) -> None:
    """Every bad call gets the same error of ours on both roads, with and without a head."""
    model, inputs = converted(case, kind), case.inputs()
    bad: list[dict[str, Any]] = [{**inputs, "output_attentions": True}]
    if case is not VIT:
        tokens = torch.ones(2, 40, dtype=torch.long)
        bad += [
            {"input_ids": torch.ones(1, 80, dtype=torch.long)},
            {"inputs_embeds": torch.ones(1, 80, 32)},
            {**inputs, "attention_mask": torch.ones(2, 1, 40, 40)},
            {**inputs, "attention_mask": tokens[:, :23]},
            {
                **inputs,
                "position_ids": torch.arange(20).repeat(2, 2),
                "attention_mask": (tokens.cumsum(-1) < 40).long(),
            },
            {**inputs, "cu_seq_lens_q": torch.tensor([0, 20, 40])},
        ]
    for arguments in bad:
        for part in (model, model.base_model):
            told = []
            for call in (part, part.forward):
                with pytest.raises(LinAttnError) as found:
                    call(**arguments)
                told.append((type(found.value), str(found.value)))
            assert told[0] == told[1]


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("kind", KINDS)
def test_images_of_another_shape(kind: str, road: Any) -> None:
    """The grid of patches follows the image; without it the windows would be those of another one."""
    model = hf_linattn.convert(ViTModel(VIT.config()).eval(), VIT.settings(kind))
    pixels = torch.randn(1, 3, 16, 36, generator=torch.Generator().manual_seed(0))  # 4 x 9 patches
    seen: list[Any] = []
    attention = model.base_model.layers[0].attention
    attention.linattn.register_forward_pre_hook(lambda m, a, k: seen.append(k["grid"]), with_kwargs=True)
    with torch.no_grad():
        got = road(model)(pixels, interpolate_pos_encoding=True)[0]
        assert torch.equal(got, model(pixel_values=pixels, interpolate_pos_encoding=True)[0])
    assert seen == [(4, 9)] * 2


# -- settings that were edited --------------------------------------------------------------------------------------
EDITS: dict[str, Any] = {
    "one value": lambda config: config.linear_attention.update(
        window_size=4 if config.model_type != "linattn_vit" else 3
    ),
    "another seed": lambda config: config.linear_attention.update(seed=5),
    "another kind": lambda config: setattr(config, "linear_attention", "favor_plus"),
    "fewer layers": lambda config: config.linear_attention.update(layers=[0]),
    "nothing": lambda config: setattr(config, "linear_attention", None),
}


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize(("kind", "case"), MATRIX)
def test_edited_settings_raise_at_the_next_forward(kind: str, case: ModelCase, edit: str, road: Any) -> None:
    model = converted(case, kind, layers=None)
    want = logits(model, **case.inputs())
    before = dict(model.config.linear_attention)
    EDITS[edit](model.config)
    for part in (model, model.base_model):
        with pytest.raises(ConfigError, match="revert"):
            road(part)(**case.inputs())
    model.config.linear_attention = before
    assert torch.equal(logits(model, **case.inputs()), want)


def test_an_edit_without_effect_is_none() -> None:
    model = converted(BERT, "favor_plus")
    want = logits(model, **BERT.inputs())
    model.config.linear_attention = {**model.config.linear_attention, "layers": None}
    assert torch.equal(logits(model, **BERT.inputs()), want)


@pytest.mark.parametrize("kind", ["favor_plus", "eva"])
def test_edited_settings_raise_in_a_compiled_model(kind: str) -> None:
    model = converted(BERT, kind)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    logits(compiled, **BERT.inputs())
    model.config.linear_attention["seed"] = 9
    with pytest.raises(Exception, match="edited after conversion"):
        compiled(**BERT.inputs())
    torch.compiler.reset()


def test_settings_of_a_converted_model_after_revert() -> None:
    model = hf_linattn.revert(converted(GPT2, "eva"))
    model.config.is_causal = False  # the stock model's own affair again
    assert logits(model, **GPT2.inputs()).isfinite().all()


# -- signatures -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stock", COUNTERPARTS, ids=lambda cls: cls.__name__)
def test_signatures_are_those_of_the_stock_model(stock: Any) -> None:
    """Trainer, `generate` and editors read them."""
    cls = COUNTERPARTS[stock]
    assert inspect.signature(cls) == inspect.signature(stock)
    assert inspect.signature(cls.forward) == inspect.signature(stock.forward)
    assert cls.forward.__doc__ == stock.forward.__doc__
    for name in ("from_pretrained", "save_pretrained", "push_to_hub"):
        ours, theirs = (set(inspect.signature(getattr(c, name)).parameters) for c in (cls, stock))
        assert theirs <= ours, (name, theirs - ours)
    own, theirs = (set(inspect.signature(c.config_class).parameters) for c in (cls, stock))
    assert own == theirs | {"linear_attention"}


def test_a_class_of_the_users_own() -> None:
    class Mine(hf_linattn.LinAttnBertForMaskedLM):
        def __init__(self, config: Any, more: int) -> None:
            super().__init__(config)
            self.more = more

        def forward(self, input_ids: Any) -> Any:
            return super().forward(input_ids=input_ids)

    config = hf_linattn.LinAttnBertConfig(**BERT.config().to_diff_dict(), linear_attention="eva")
    model = Mine(config, 3).eval()
    assert list(inspect.signature(Mine).parameters) == ["config", "more"]
    assert model(**BERT.inputs())[0].isfinite().all()
    with pytest.raises(InputError, match="64 positions"):
        model(torch.ones(1, 80, dtype=torch.long))
