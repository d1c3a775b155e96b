"""A kind's name is used or refused, by every road, and what a refusal advises works."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import KINDS, VOCAB
from torch import nn
from transformers import (
    AttentionInterface,
    AutoModel,
    DebertaV2Config,
    DebertaV2Model,
    FalconConfig,
    FalconModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
)

import hf_linattn
from hf_linattn.errors import InputError, LinAttnError, UnsupportedError
from hf_linattn.integrations.canary import check_seams
from hf_linattn.integrations.seams import attention_of
from hf_linattn.integrations.users import asks_interface, attends_alone, parts_of

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))

from sweep_parts import check, table  # noqa: E402

# Model type -> kinds that compute in it.
EVERY = set(KINDS)
CAUSAL = {"eva", "favor_plus", "favor_sharp"}
CROSS = {"favor_plus", "favor_sharp"}
COMPUTE: dict[str, set[str]] = {
    **dict.fromkeys(
        ("bert", "roberta", "albert", "distilbert", "electra", "vit", "deit", "siglip_vision_model"), EVERY
    ),
    **dict.fromkeys(("llama", "gpt2", "qwen2", "gpt_neox", "clip", "deepseek_v3", "llava"), CAUSAL),
    **dict.fromkeys(("bart", "whisper"), CROSS),
}
REFUSED = {
    "deberta-v2": "computes softmax attention itself \\(DisentangledSelfAttention\\)",
    "bloom": "computes softmax attention itself",
    "pegasus_x": "made a causal attention mask, but PegasusXAttention computes bidirectional attention.*'eager'",
    "resnet": "no attention layer",
    "mamba": "no attention layer",
    "blip": "computes softmax attention itself",
    "mistral": r"'mistral' uses sliding-window attention \(config.sliding_window=4096\)",
    "modernbert": r"sliding-window attention in 1 of its 2 layers \(config.layer_types, config.sliding_window=64",
    "mimi_encoder": "sliding-window attention.*Use attn_implementation='sdpa'",  # whose window may not be None
    "gemma2": "sliding-window attention in 1 of its 2 layers",
    "llama4_text": "chunked attention in all of its 2 layers",
    "gpt_oss": "sliding-window attention.*'eager'",
    "t5": "A bias on attention logits|computes softmax attention itself|does not let the attention",  # by release
    "swin": "attention_mask must be 2-D",
    "parakeet_encoder": "attention_mask must be 2-D",  # names every argument of the attention function
    "glm4v_moe_text": r"position_ids must be \[batch, tokens\].*'sdpa'",
}


@pytest.fixture(scope="module")
def swept() -> Any:
    """Results by model type, made when they are first asked for."""
    found: dict[str, Any] = {}
    for family in ("bert", "gpt2", "vit"):
        check_seams(family)  # its tiny models call the kinds too

    def sweep(model_type: str) -> dict[str, Any]:
        if model_type not in found:
            found[model_type] = check.sweep_one(model_type)
        return found[model_type]

    return sweep


@pytest.mark.parametrize("model_type", [*COMPUTE, *REFUSED])
def test_every_name_computes_or_is_refused(model_type: str, swept: Any) -> None:
    """By all roads; the sweep compares with softmax, counts the calls and follows the advice of every refusal."""
    row = swept(model_type)
    assert row["built"], row
    assert row["run"], row
    assert table.faults({model_type: row}) == []
    assert set(table.works(row)) == COMPUTE.get(model_type, set()), row["kinds"]
    for kind in EVERY - COMPUTE.get(model_type, set()):
        for verdict in row["kinds"][kind].values():
            assert verdict["verdict"] == "refused"
            assert re.search(REFUSED.get(model_type, "Use one of"), verdict["why"]), verdict["why"]


@pytest.mark.parametrize("model_type", ["rag", "xclip"])
def test_a_model_that_one_way_alone_reaches(model_type: str, swept: Any) -> None:
    """A name that Transformers does not hand on, or does not let be changed: refused, with the way that works."""
    row = swept(model_type)
    assert row["run"], row
    assert table.faults({model_type: row}) == []
    assert set(table.works(row)) == CROSS
    for kind in CROSS:
        for way, verdict in row["kinds"][kind].items():
            advice = f"set_attn_implementation\\('{kind}'\\)|Load the model with attn_implementation='{kind}'"
            assert verdict["verdict"] == "works" or re.search(advice, verdict["why"]), (way, verdict)


def test_a_constructor_that_does_not_call_post_init() -> None:
    """The name is looked at when the model has been made."""

    class Bare(PreTrainedModel):
        config_class = LlamaConfig
        _supports_sdpa = True

        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            self.linear = nn.Linear(4, 4)

    Bare._from_config(LlamaConfig(), attn_implementation="sdpa")
    with pytest.raises(UnsupportedError, match="Bare has no attention layer that asks"):
        Bare._from_config(LlamaConfig(), attn_implementation="eva")


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_by_name(kind: str) -> None:
    """Some models name every argument of their attention function: an error inside keeps its words."""
    module = nn.Module()
    module.config, module.is_causal = LlamaConfig(), False  # type: ignore[assignment]
    states = {name: torch.randn(1, 32, 5, 128) for name in ("query", "key", "value")}
    attention = AttentionInterface()[kind]
    with pytest.raises(InputError, match="attention_mask must be 2-D"):
        attention(module, **states, attention_mask=torch.zeros(1, 1, 5, 5))
    if kind != "lara":
        by_place = attention(module, *states.values(), None)[0]
        assert torch.equal(attention(module, **states, attention_mask=None)[0], by_place)


def deberta() -> DebertaV2Model:
    config = DebertaV2Config(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    )
    return DebertaV2Model(config).eval()


OWN = r"DebertaV2Model computes softmax attention itself \(DisentangledSelfAttention\).*'eager'"


@pytest.mark.parametrize("kind", KINDS)
def test_name_that_would_be_ignored(kind: str, tmp_path: Path) -> None:
    """Refused by every road; the model stays as it was."""
    model = deberta()
    model.save_pretrained(tmp_path)
    for load in (AutoModel.from_pretrained, DebertaV2Model.from_pretrained):
        with pytest.raises(UnsupportedError, match=OWN):
            load(tmp_path, attn_implementation=kind)
    with pytest.raises(UnsupportedError, match=OWN):
        AutoModel.from_config(model.config, attn_implementation=kind)
    ids = torch.randint(3, VOCAB, (1, 9))
    before, name = model(ids)[0], attention_of(model.config)
    for given in (kind, {"": kind}):
        with pytest.raises(UnsupportedError, match=r"DebertaV2Model"):
            model.set_attn_implementation(given)
        assert attention_of(model.config) == name
    assert torch.equal(model(ids)[0], before)
    assert AutoModel.from_pretrained(tmp_path, attn_implementation="eager")(ids)[0].isfinite().all()


def test_a_table_of_attention_classes(tmp_path: Path) -> None:
    """Models that look the name up in a table of their own would end in a KeyError."""
    config = FalconConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, ffn_hidden_size=48
    )
    message = r"FalconModel chooses among its own attention classes.*has none for 'eva'.*'sdpa'"
    FalconModel(config).save_pretrained(tmp_path)
    for make in (
        lambda **given: AutoModel.from_config(config, **given),
        lambda **given: AutoModel.from_pretrained(tmp_path, **given),
    ):
        with pytest.raises(UnsupportedError, match=message):
            make(attn_implementation="eva")
        make(attn_implementation="sdpa")


def test_parts_of_a_model() -> None:
    """A vision tower that attends by itself: the name is refused for the whole, and taken for the part that asks."""
    from transformers import LlavaConfig, LlavaModel, VitDetConfig

    vision = VitDetConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=8)
    text = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=VOCAB
    )

    def model(**given: Any) -> Any:
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=VOCAB - 1)
        return LlavaModel._from_config(config, **given).eval()

    message = r"VitDetModel computes softmax attention itself.*attn_implementation=\{'text_config': 'favor_plus'\}"
    with pytest.raises(UnsupportedError, match=message):
        model(attn_implementation="favor_plus")
    stock = model()
    names = {part.owner: attention_of(part.config) for part in parts_of(stock)}
    with pytest.raises(UnsupportedError, match=message):
        stock.set_attn_implementation("favor_plus")
    assert {part.owner: attention_of(part.config) for part in parts_of(stock)} == names
    ids = torch.randint(3, VOCAB - 1, (1, 50))
    exact = stock(input_ids=ids)[0]
    stock.set_attn_implementation({"text_config": "favor_plus"})
    made = model(attn_implementation={"text_config": "favor_plus"})
    made.load_state_dict(stock.state_dict())
    assert torch.equal(made(input_ids=ids)[0], stock(input_ids=ids)[0])
    assert not torch.allclose(stock(input_ids=ids)[0], exact, atol=1e-5)


def test_who_asks_and_who_attends_alone() -> None:
    class Asking(nn.Module):
        def forward(self, query: Any) -> Any:
            from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

            return [ALL_ATTENTION_FUNCTIONS.get_interface(name, None) for name in ("a", "b")]

    class OwnAttention(nn.Module):
        def forward(self, query: torch.Tensor) -> torch.Tensor:
            return (query @ query.mT).softmax(-1) @ query

    class Router(nn.Module):
        def forward(self, query: torch.Tensor) -> torch.Tensor:
            return query.softmax(-1)

    asking = {cls for cls in (Asking, OwnAttention, Router, nn.MultiheadAttention) if asks_interface(cls)}
    alone = {cls for cls in (Asking, OwnAttention, Router, nn.MultiheadAttention) if attends_alone(cls)}
    assert (asking, alone) == ({Asking}, {OwnAttention, nn.MultiheadAttention})
    assert not attends_alone(hf_linattn.LinAttnGPT2LMHeadModel)  # whose generation draws from a softmax
    assert not asks_interface(DebertaV2Model)  # the base class of all models knows the table


def test_a_stock_name_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models without a kind's name pay for nothing."""
    from hf_linattn.integrations import names

    monkeypatch.setattr(names, "parts_of", lambda model: pytest.fail("looked at"))
    deberta().set_attn_implementation("sdpa")


def test_convert_and_native_do_not_send_each_other_round() -> None:
    """LARA in a Llama: neither can; both name what does."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=VOCAB
    )
    model = LlamaModel(config).eval()
    model.set_attn_implementation("lara")
    ids = torch.randint(3, VOCAB, (1, 9))
    with pytest.raises(UnsupportedError) as native:
        model(ids)
    assert "hf_linattn.convert" not in str(native.value)
    assert "cannot be converted" in str(native.value)
    with pytest.raises(UnsupportedError, match="'lara' does not work in it without conversion, but one of") as error:
        hf_linattn.convert(model, "lara")
    advised = re.findall(r"set_attn_implementation\('(\w+)'\)", str(error.value))
    assert set(advised) == {"eva"}
    model.set_attn_implementation(advised[0])
    assert model(ids)[0].isfinite().all()
    for refused in (lambda: hf_linattn.revert(model), lambda: hf_linattn.calibrate(model, [{"input_ids": ids}])):
        with pytest.raises(LinAttnError, match="Models of type 'llama' cannot be converted"):
            refused()
    with pytest.raises(UnsupportedError, match="No linear attention kind works in it without conversion either"):
        hf_linattn.convert(deberta(), "eva")


def test_the_page_is_what_the_results_say() -> None:
    found = json.loads((ROOT / "experiments" / "results" / "model_types.json").read_text())
    assert (ROOT / "docs" / "model_types.md").read_text() == table.render(found, tolerance=check.TOLERANCE)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_whole_sweep(tmp_path: Path) -> None:
    """No architecture of the installed Transformers takes a name and ignores it."""
    import subprocess

    command = [sys.executable, str(ROOT / "scripts" / "architecture_sweep.py")]
    command += ["--out", str(tmp_path / "out.json"), "--page", str(tmp_path / "page.md")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
