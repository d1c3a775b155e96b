"""`hf-linattn convert` and `info`: from stock checkpoints to converted ones and back, and what both are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BY_NAME, KINDS
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from shell import mistake, shell, told
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, BertModel, RobertaConfig

import hf_linattn
from hf_linattn.modules.registry import get_kind

STOCK = {**{name: case.stock for name, case in BY_NAME.items()}, "bert": BertModel}


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


@pytest.mark.parametrize("family", STOCK)
def test_the_head_and_all_weights_are_kept(folder: Path, tmp_path: Path, family: str) -> None:
    out = tmp_path / "out"
    text = shell("convert", folder / family, out, "--kind", "eva", "--base-model", "some/base").stdout
    name = f"LinAttn{STOCK[family].__name__}"
    assert f"Saved to {out}: {name}, " in text
    assert "eva in layers 0, 1." in text
    model = getattr(hf_linattn, name).from_pretrained(out).state_dict()
    stock = STOCK[family].from_pretrained(folder / family).state_dict()
    assert all(torch.equal(model[key], value) for key, value in stock.items())
    (AutoImageProcessor if family == "vit" else AutoTokenizer).from_pretrained(out)
    assert ModelCard.load(out / "README.md").data.base_model == "some/base"


def test_settings_and_layers(folder: Path, tmp_path: Path) -> None:
    flags = ["--kind", "favor_plus", "--learned", "--layers", "1", "--set", "window_size=4"]
    flags += ["--set", "overlap_window=true", "--set", "normalizer=kernel", "--set", "slot_dropout=1e-1"]
    found = told("convert", folder / "bert-mlm", tmp_path, *flags)
    config = AutoConfig.from_pretrained(tmp_path).linear_attention
    wanted = {"learned": True, "window_size": 4, "overlap_window": True, "normalizer": "kernel", "slot_dropout": 0.1}
    assert wanted.items() <= config.items()
    assert wanted.items() <= found["settings"].items()
    assert found["layers"] == config["layers"] == [1]
    assert found["class"] == "LinAttnBertForMaskedLM"
    assert found["needs_calibration"] is False


def test_it_says_what_comes_next(folder: Path, tmp_path: Path) -> None:
    text = shell("convert", folder / "gpt2", tmp_path, "--kind", "lara", "--learned").stdout
    assert f"hf-linattn calibrate {tmp_path} OUT --inputs FILE" in text
    assert f"hf-linattn transfer {tmp_path} OUT --inputs FILE" in text


def test_back_to_softmax_and_to_another_kind(folder: Path, tmp_path: Path) -> None:
    shell("convert", folder / "plain", tmp_path / "back", "--revert")
    assert AutoConfig.from_pretrained(tmp_path / "back").architectures == ["GPT2LMHeadModel"]
    original = weights(folder / "gpt2")
    assert original.keys() == weights(tmp_path / "back").keys()
    assert all(torch.equal(original[name], value) for name, value in weights(tmp_path / "back").items())
    assert not (tmp_path / "back" / "README.md").exists()
    assert "Give --revert" in mistake("convert", folder / "plain", tmp_path / "eva", "--kind", "eva")
    found = told("convert", folder / "plain", tmp_path / "eva", "--revert", "--kind", "eva")
    assert found["kind"] == "eva"


@pytest.mark.parametrize(("source", "flags"), [("gpt2", ["--kind", "eva"]), ("gpt2", []), ("plain", [])])
def test_longer_positions(folder: Path, tmp_path: Path, source: str, flags: list[str]) -> None:
    found = told("convert", folder / source, tmp_path, *flags, "--extend-positions", "96")
    assert found["positions"] == AutoConfig.from_pretrained(tmp_path).n_positions == 96
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == 96


def test_a_checkpoint_without_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    """For a BERT without its vocabulary Transformers makes an empty tokenizer, which must not be saved."""
    BY_NAME["bert-mlm"].build().save_pretrained(tmp_path / "bare")
    result = shell("convert", tmp_path / "bare", tmp_path / "out", "--kind", "eva")
    assert "There is no tokenizer or image processor in" in result.stderr
    assert not list((tmp_path / "out").glob("tokenizer*"))


def test_saving_over_an_earlier_checkpoint(folder: Path, tmp_path: Path) -> None:
    shell("convert", folder / "gpt2", tmp_path, "--kind", "eva")
    assert "is not empty. Name another one, or give --overwrite" in mistake(
        "convert", folder / "gpt2", tmp_path, "--kind", "lara"
    )
    assert AutoConfig.from_pretrained(tmp_path).linear_attention["kind"] == "eva"
    shell("convert", folder / "gpt2", tmp_path, "--kind", "lara", "--overwrite")
    assert AutoConfig.from_pretrained(tmp_path).linear_attention["kind"] == "lara"


# -- sentence-transformers --------------------------------------------------------------------------------------------
@pytest.fixture
def embedder(folder: Path, tmp_path: Path) -> Path:
    """A BERT as sentence-transformers saves it. A folder without files, as of a normalisation, is on no Hub."""
    shutil.copytree(folder / "bert", path := tmp_path / "embedder")
    places = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": place, "type": f"sentence_transformers.models.{name}"}
        for i, (place, name) in enumerate(places.items())
    ]
    pooling = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (path / "1_Pooling").mkdir()
    for name, content in {
        "modules.json": modules,
        "1_Pooling/config.json": pooling,
        "sentence_bert_config.json": {"max_seq_length": 24, "do_lower_case": False},
        "config_sentence_transformers.json": {"__version__": {"sentence_transformers": "2.0.0"}},
        "other.json": {},
    }.items():
        (path / name).write_text(json.dumps(content))
    return path


def test_a_folder_of_sentence_transformers_stays_one(folder: Path, embedder: Path, tmp_path: Path) -> None:
    """Through every command that saves a model."""
    out, texts = tmp_path / "out", ["--inputs", folder / "text.txt", "--max-length", "40", "--rows", "8"]
    shell("convert", embedder, tmp_path / "sharp", "--kind", "favor_sharp", "--learned", "--set", "window_size=4")
    shell("calibrate", tmp_path / "sharp", tmp_path / "calibrated", *texts)
    shell("transfer", tmp_path / "calibrated", out, *texts[:-2], "--steps", "1", "--held-out", "2")
    same = ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "config_sentence_transformers.json")
    assert all((out / name).read_bytes() == (embedder / name).read_bytes() for name in same)
    assert not (out / "other.json").exists()
    library = pytest.importorskip("sentence_transformers")
    shell("convert", out, tmp_path / "longer", "--extend-positions", "96")
    for path, length in ((out, 24), (tmp_path / "longer", 96)):
        loaded = library.SentenceTransformer(str(path), device="cpu")
        assert type(loaded[0].auto_model).__name__ == "LinAttnBertModel"
        assert loaded.max_seq_length == length
        text = " ".join(f"w{i % 9}" for i in range(90))
        inputs = AutoTokenizer.from_pretrained(path)(text, truncation=True, max_length=length, return_tensors="pt")
        with torch.no_grad():
            state = hf_linattn.LinAttnBertModel.from_pretrained(path).eval()(**inputs).last_hidden_state[0, 0]
        found = loaded.encode(text, convert_to_tensor=True)
        torch.testing.assert_close(found, state / state.norm(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("path", ["../elsewhere", "/etc"])
def test_modules_that_are_none(embedder: Path, tmp_path: Path, path: str) -> None:
    for content in (f'[{{"path": ""}}, {{"path": "{path}"}}]', '{"a": 1}', "[", "[]"):
        (embedder / "modules.json").write_text(content)
        assert "modules.json' is no list of modules" in mistake("convert", embedder, tmp_path / "out", "--kind", "eva")
    assert not (tmp_path / "out").exists()


# -- info -------------------------------------------------------------------------------------------------------------
def test_what_a_stock_model_can_become(folder: Path) -> None:
    found = told("info", folder / "gpt2")
    assert found["class"] == "GPT2LMHeadModel"
    assert found["converted"] is False
    assert found["parameters"] == BY_NAME["gpt2"].build().num_parameters()
    calibrated = {kind for kind in KINDS if get_kind(kind).causal == "calibrated"}
    assert found["kinds"] == {kind: "yes, then calibrate" if kind in calibrated else "yes" for kind in KINDS}
    assert found["needs"]["transformers"]["required"]
    assert set(told("info", folder / "vit")["kinds"].values()) == {"yes"}
    text = shell("info", folder / "gpt2").stdout
    assert "can be converted to" in text
    assert all(kind in text for kind in KINDS)


def test_a_model_that_cannot_be_converted(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
    RobertaConfig(**sizes, architectures=["RobertaModel"]).save_pretrained(tmp_path)
    found = told("info", tmp_path)
    assert found["kinds"] == {}
    assert "model.set_attn_implementation(" in found["without_conversion"]
    assert found["dtypes"] is None  # there are no weights at all


def test_a_converted_checkpoint(folder: Path, tmp_path: Path) -> None:
    found = told("info", folder / "sharp")
    assert found["kind"] == "favor_sharp"
    assert found["settings"]["num_features"] == 8
    assert found["learned"] is True
    assert found["calibrated"] is False
    assert found["missing"] == []
    model = hf_linattn.LinAttnGPT2LMHeadModel.from_pretrained(folder / "sharp")
    assert found["parameters"] == model.num_parameters()
    learned = sum(value.numel() for name, value in model.named_parameters() if ".0.attn.linattn." in name)
    assert found["layers"][0]["learned_parameters"] == learned > 0

    shell("calibrate", folder / "sharp", tmp_path, "--inputs", folder / "text.txt", "--rows", "4")
    found = told("info", tmp_path)
    assert found["calibrated"] is True
    assert found["layers"][1]["calibrated_tokens"] == 4 * 64
    assert "favor_sharp" in shell("info", tmp_path).stdout


def test_layers_left_on_softmax(folder: Path, tmp_path: Path) -> None:
    shell("convert", folder / "gpt2", tmp_path, "--kind", "eva", "--layers", "0")
    found = told("info", tmp_path)
    assert [layer["attention"] for layer in found["layers"]] == ["eva", "softmax"]
    assert found["calibrated"] == "not needed"


def test_an_incomplete_checkpoint(folder: Path, tmp_path: Path) -> None:
    shell("convert", folder / "gpt2", tmp_path, "--kind", "favor_plus")
    left = {name: value for name, value in weights(tmp_path).items() if ".1.attn.linattn." not in name}
    save_file(left, tmp_path / "model.safetensors", {"format": "pt"})
    missing = told("info", tmp_path)["missing"]
    assert missing
    assert all(".1.attn.linattn." in name for name in missing)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    assert "cannot be read" in mistake("info", tmp_path)


def test_weights_are_not_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)
    for name in ("sharp", "gpt2"):
        assert json.loads(shell("info", folder / name, "--json").stdout)["class"]
