"""Checkpoints: stock ones into converted classes, damaged and contradictory ones, interrupted saves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BERT, BY_NAME, GPT2, VIT, ModelCase, largest, logits, matrix, ready
from checkpoints import edit_config
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    BertForMaskedLM,
    EncoderDecoderModel,
)

import hf_linattn
from hf_linattn.errors import CheckpointError, ConfigError
from hf_linattn.models import COUNTERPARTS

LOADING: list[dict[str, Any]] = [
    {},
    {"dtype": torch.bfloat16},
    {"dtype": torch.float16},
    {"dtype": "auto"},
    {"device_map": {"": "cpu"}},
    {"device_map": "auto"},
    {"device_map": "cpu", "dtype": torch.bfloat16},
]


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    BERT.build().save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    hf_linattn.convert(BERT.build(), BERT.settings("favor_plus")).save_pretrained(tmp_path / "converted")
    return tmp_path / "converted"


# -- stock checkpoints ----------------------------------------------------------------------------------------------
@pytest.mark.compat("save and load")
@pytest.mark.parametrize("arguments", LOADING, ids=str)
@pytest.mark.parametrize(("kind", "case"), matrix(BERT, GPT2))
def test_stock_checkpoint_into_a_converted_class(
    kind: str, case: ModelCase, arguments: dict[str, Any], tmp_path: Path
) -> None:
    """The new state is what `convert` gives, however the model is loaded, and nothing is left uninitialised."""
    original = case.build()
    original.save_pretrained(tmp_path)
    expected = hf_linattn.convert(original, case.settings(kind))
    cls = COUNTERPARTS[case.stock]
    # Memory that Transformers hands out for missing tensors is often zero by luck: fill it with something else.
    filler = [torch.full((4096,), float("nan")) for _ in range(200)]
    del filler
    loaded = cls.from_pretrained(tmp_path, linear_attention=case.settings(kind), **arguments)
    assert loaded.config.model_type == f"linattn_{case.name[:4]}"
    assert loaded.config.linear_attention == expected.config.linear_attention
    assert loaded.config._attn_implementation == kind
    target = loaded.state_dict()
    for name, tensor in expected.state_dict().items():
        got = target[name]
        assert not got.is_meta
        if "linattn" in name and name not in dict(expected.named_parameters()):
            assert got.dtype == torch.float32
        assert torch.equal(got, tensor.to(got.dtype)), name
    if "dtype" not in arguments:
        ours, theirs = (logits(ready(model), **case.inputs()) for model in (loaded, expected))
        assert largest(ours - theirs) < 1e-5


@pytest.mark.parametrize("form", ["favor_plus", {"kind": "favor_plus", "num_features": 7}, "object"])
def test_forms_of_linear_attention(form: Any, stock: Path) -> None:
    form = hf_linattn.FavorPlusConfig(num_features=7) if form == "object" else form
    model = hf_linattn.LinAttnBertForMaskedLM.from_pretrained(stock, linear_attention=form)
    values = model.config.linear_attention
    assert values["kind"] == "favor_plus"
    assert values["version"] == 1
    assert values["num_features"] == (256 if form == "favor_plus" else 7)
    assert values["layers"] == [0, 1]
    assert values["attention_dropout"] == 0.1
    assert model.config.attention_probs_dropout_prob == 0
    config = hf_linattn.LinAttnBertConfig.from_pretrained(stock, linear_attention=form)
    again = hf_linattn.LinAttnBertForMaskedLM.from_pretrained(stock, config=config)
    assert torch.equal(logits(again, **BERT.inputs()), logits(model, **BERT.inputs()))


def test_from_config_and_direct_construction(converted: Path) -> None:
    config = hf_linattn.LinAttnBertConfig.from_pretrained(converted)
    expected = AutoModelForMaskedLM.from_pretrained(converted).state_dict()
    direct = hf_linattn.LinAttnBertForMaskedLM(config)
    by_auto = AutoModelForMaskedLM.from_config(config, dtype=torch.bfloat16)
    with torch.device("meta"):
        on_meta = hf_linattn.LinAttnBertForMaskedLM(config)
    on_meta.to_empty(device="cpu")
    for module in on_meta.modules():
        module._is_hf_initialized = False  # type: ignore[assignment]
    on_meta.initialize_weights()
    for model in (direct, by_auto, on_meta):
        state = model.state_dict()
        for name in expected:
            if "linattn" in name:
                assert state[name].dtype == torch.float32
                assert torch.equal(state[name], expected[name]), name


@pytest.mark.compat("save and load")
def test_base_model_and_heads_load_each_other(converted: Path, tmp_path: Path) -> None:
    full = AutoModelForMaskedLM.from_pretrained(converted)
    base = AutoModel.from_pretrained(converted)
    assert type(base) is hf_linattn.LinAttnBertModel
    states = full(**BERT.inputs(), output_hidden_states=True).hidden_states[-1]
    assert torch.equal(base(**BERT.inputs()).last_hidden_state, states)
    base.save_pretrained(tmp_path / "base")
    head = hf_linattn.LinAttnBertForSequenceClassification.from_pretrained(tmp_path / "base")
    assert torch.equal(head.bert(**BERT.inputs()).last_hidden_state, states)


@pytest.mark.compat("save and load")
def test_casts_keep_the_buffers(converted: Path) -> None:
    model = AutoModelForMaskedLM.from_pretrained(converted)
    before = {name: tensor.clone() for name, tensor in model.named_buffers() if "linattn" in name}
    assert before
    for cast in (model.bfloat16, model.half, model.float, lambda: model.to(torch.float16)):
        cast()
        for name, tensor in before.items():
            assert torch.equal(model.get_buffer(name), tensor), name


def test_stock_checkpoint_needs_linear_attention(stock: Path) -> None:
    with pytest.raises(CheckpointError, match=r"needs it: from_pretrained\(\.\.\., linear_attention=kind\)"):
        hf_linattn.LinAttnBertForMaskedLM.from_pretrained(stock)
    with pytest.raises(CheckpointError, match="linear_attention=kind"):
        hf_linattn.LinAttnBertForMaskedLM(BERT.config())


@pytest.mark.parametrize("kind", ["eva", "lara"])
def test_a_kind_without_tensors(kind: str, tmp_path: Path) -> None:
    """With proposal_map="none" there is nothing to save, and nothing missing on loading."""
    settings = BERT.settings(kind, proposal_map="none")
    model = hf_linattn.convert(BERT.build(), settings)
    assert not any("linattn" in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    assert torch.equal(
        logits(AutoModelForMaskedLM.from_pretrained(tmp_path), **BERT.inputs()), logits(model, **BERT.inputs())
    )
    for changes in ({"proposal_map": "residual"}, {"layers": [0]}, {"seed": 1}):
        values = {**settings.to_dict(), **changes}
        with pytest.raises(CheckpointError, match=r"contradict `linear_attention`"):
            AutoModelForMaskedLM.from_pretrained(tmp_path, linear_attention=values)


def test_attention_dropout_is_remembered() -> None:
    """Through a second assignment, which reads a config whose dropout is 0 already."""
    config = hf_linattn.LinAttnBertConfig(linear_attention="favor_plus")
    config.linear_attention = hf_linattn.EvaConfig()
    assert config.linear_attention["attention_dropout"] == 0.1
    config.attention_probs_dropout_prob = 0.3
    config.linear_attention = "lara"
    assert config.linear_attention["attention_dropout"] == 0.3
    assert config.attention_probs_dropout_prob == 0


@pytest.mark.parametrize("source", ["converted", "loaded"])
@pytest.mark.parametrize("kind", ["favor_sharp", "eva"])
def test_parts_of_a_composite_keep_their_kind_and_state(kind: str, source: str, tmp_path: Path) -> None:
    encoder = hf_linattn.convert(BY_NAME["bert-classifier"].build(), "favor_plus").bert
    decoder = hf_linattn.convert(GPT2.build(add_cross_attention=True), GPT2.settings(kind))
    with torch.no_grad():
        for name, tensor in [*decoder.named_parameters(), *decoder.named_buffers()]:
            if "linattn" in name:
                tensor.add_(0.125)  # as after training and calibration
    if source == "loaded":
        decoder.save_pretrained(tmp_path / "decoder")
        decoder = GPT2.auto.from_pretrained(tmp_path / "decoder")
    state = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    model = EncoderDecoderModel(encoder=encoder, decoder=decoder).eval()
    assert any("linattn" in name for name in state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.decoder.state_dict().items())
    inputs = {**BERT.inputs(), "decoder_input_ids": GPT2.inputs()["input_ids"]}
    expected = logits(model, **inputs)
    model.save_pretrained(tmp_path)
    loaded = EncoderDecoderModel.from_pretrained(tmp_path)
    assert loaded.encoder.config._attn_implementation == "favor_plus"
    assert loaded.decoder.config._attn_implementation == kind
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.decoder.state_dict().items())
    assert largest(logits(loaded, **inputs) - expected) < 1e-5
    for wanted in ("sdpa", {"decoder": "eager"}, {"encoder": "lara"}):
        with pytest.raises(ConfigError, match=r"as `linear_attention` says"):
            EncoderDecoderModel.from_pretrained(tmp_path, attn_implementation=wanted)
    loaded.set_attn_implementation("sdpa")
    assert loaded.encoder.config._attn_implementation == "sdpa"


# -- damaged and contradictory checkpoints --------------------------------------------------------------------------
def test_checkpoint_with_a_missing_field(converted: Path) -> None:
    edit_config(converted, linear_attention=None)
    with pytest.raises(CheckpointError, match=r"has no `linear_attention`.*damaged"):
        AutoModelForMaskedLM.from_pretrained(converted)


def test_checkpoint_of_a_newer_version(converted: Path) -> None:
    values = json.loads((converted / "config.json").read_text())["linear_attention"]
    edit_config(converted, linear_attention={**values, "version": 2})
    with pytest.raises(CheckpointError, match=r"version'\] is 2.*up to 1.*[Uu]pgrade"):
        AutoModelForMaskedLM.from_pretrained(converted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": [0]}, "unexpected .*layer.1.*linattn"),
        ({"num_features": 16}, "of another shape .*linattn.projection"),
        ({"kind": "eva"}, "EvaConfig has no field '.*'; fields: "),
    ],
)
def test_field_contradicts_the_weights(change: dict[str, Any], message: str, converted: Path) -> None:
    values = json.loads((converted / "config.json").read_text())["linear_attention"]
    edit_config(converted, linear_attention={**values, **change})
    with pytest.raises((CheckpointError, ConfigError), match=message):
        AutoModelForMaskedLM.from_pretrained(converted)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        AutoModelForMaskedLM.from_pretrained(converted, ignore_mismatched_sizes=True)


def test_another_kind_than_the_weights(converted: Path) -> None:
    with pytest.raises(CheckpointError, match=r"contradict `linear_attention`.*revert the model"):
        AutoModelForMaskedLM.from_pretrained(converted, linear_attention="lara")


RELU = BERT.settings("favor_plus", kernel="relu", window_size=0)
T5 = BERT.settings("eva", relative_position="t5")


@pytest.mark.parametrize(
    ("saved", "asked", "message"),
    [
        (BERT.settings("favor_plus"), BERT.settings("favor_sharp"), "kind 'favor_plus' in config.json"),
        (BERT.settings("favor_plus"), BERT.settings("favor_plus", seed=3), "seed 0 in config.json"),
        (BERT.settings("lara", window_size=0), BERT.settings("eva"), "kind 'lara' in config.json"),
        (RELU, RELU.replace(kernel="exp"), "kernel 'relu' in config.json"),
        (T5, T5.replace(relative_index="published"), "relative_index 'corrected' in config.json"),
    ],
    ids=["kind", "seed", "lara-eva", "kernel", "relative-index"],
)
def test_tensors_that_fit_by_chance(saved: Any, asked: Any, message: str, tmp_path: Path) -> None:
    hf_linattn.convert(BERT.build(), saved).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"contradict `linear_attention`.*{message}"):
        AutoModelForMaskedLM.from_pretrained(tmp_path, linear_attention=asked)
    # No tensor depends on these (a table of relative positions does on the window).
    window = saved.window_size if saved == T5 else 2 * saved.window_size
    changed = saved.replace(window_size=window, slot_dropout=0.25)
    values = AutoModelForMaskedLM.from_pretrained(tmp_path, linear_attention=changed).config.linear_attention
    assert (values["window_size"], values["slot_dropout"]) == (changed.window_size, 0.25)
    assert values["attention_dropout"] == 0.1


@pytest.mark.parametrize("dropped", ["all", "one"])
def test_weights_without_linear_attention(dropped: str, converted: Path) -> None:
    path = converted / "model.safetensors"
    state = load_file(path)
    names = sorted(name for name in state if "linattn" in name)
    for name in names if dropped == "all" else names[:1]:
        del state[name]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="incomplete" if dropped == "all" else "contradict.*missing"):
        AutoModelForMaskedLM.from_pretrained(converted)


def test_mismatched_sizes_elsewhere_keep_their_meaning(converted: Path) -> None:
    edit_config(converted, vocab_size=61)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes=True"):
        AutoModelForMaskedLM.from_pretrained(converted)
    model, info = AutoModelForMaskedLM.from_pretrained(
        converted, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert model.config.vocab_size == 61
    assert info["mismatched_keys"]


# -- saving ---------------------------------------------------------------------------------------------------------
def test_safetensors_only(converted: Path, tmp_path: Path) -> None:
    model = AutoModelForMaskedLM.from_pretrained(converted)
    with pytest.raises(CheckpointError, match="safe_serialization must be True"):
        model.save_pretrained(tmp_path / "x", safe_serialization=False)
    assert not any(name.endswith(".bin") for name in os.listdir(converted))


@pytest.mark.compat("save and load")
def test_arguments_of_save_pretrained(converted: Path, tmp_path: Path) -> None:
    model = AutoModelForMaskedLM.from_pretrained(converted)
    expected = logits(model, **BERT.inputs())
    target = tmp_path / "out"
    model.save_pretrained(target, max_shard_size="10KB")
    assert (target / "model.safetensors.index.json").exists()
    assert torch.equal(logits(AutoModelForMaskedLM.from_pretrained(target), **BERT.inputs()), expected)
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(target, state_dict=dict(state))  # over the sharded one: no shard or index may stay
    assert sorted(os.listdir(target)) == ["config.json", "model.safetensors"]
    name = "bert.embeddings.LayerNorm.bias"
    assert torch.equal(load_file(target / "model.safetensors")[name], state[name])
    (target / "pytorch_model.bin").write_bytes(b"old")
    (target / "notes.txt").write_text("mine")
    model.save_pretrained(target)
    assert sorted(os.listdir(target)) == ["config.json", "model.safetensors", "notes.txt"]
    model.save_pretrained(target, variant="fp16")
    assert torch.equal(logits(AutoModelForMaskedLM.from_pretrained(target, variant="fp16"), **BERT.inputs()), expected)
    assert torch.equal(logits(AutoModelForMaskedLM.from_pretrained(target), **BERT.inputs()), expected)
    other = tmp_path / "other"
    model.save_pretrained(other, is_main_process=False)
    BERT.build().save_pretrained(tmp_path / "stock", is_main_process=False)
    # Nothing; the stock classes of Transformers 5.10 wrote their weights all the same.
    assert os.listdir(other) == os.listdir(tmp_path / "stock")
    with pytest.raises(NotADirectoryError, match="must be a folder"):
        model.save_pretrained(target / "notes.txt")


def test_config_changed_after_conversion(converted: Path, tmp_path: Path) -> None:
    """What is saved is what the model does."""
    model = AutoModelForMaskedLM.from_pretrained(converted)
    values = dict(model.config.linear_attention)
    for change in ({"window_size": 4}, {"layers": [0]}):
        model.config.linear_attention = {**values, **change}
        with pytest.raises(CheckpointError, match=r"does not describe layer \d any more"):
            model.save_pretrained(tmp_path / "x")
    model.config.linear_attention = values
    model.save_pretrained(tmp_path / "x")


def test_killed_during_a_save(converted: Path) -> None:
    """What a process that is killed leaves behind does not disturb loading, and the next save removes it."""
    left_over = converted / "_incomplete_save_abc"
    left_over.mkdir()
    (left_over / "config.json").write_text("{}")
    (left_over / "model.safetensors").write_bytes(b"half")
    model = AutoModelForMaskedLM.from_pretrained(converted)
    model.save_pretrained(converted)
    assert not left_over.exists()


def test_register_for_auto_class_does_nothing(converted: Path, tmp_path: Path) -> None:
    hf_linattn.LinAttnBertForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
    hf_linattn.LinAttnBertConfig.register_for_auto_class()
    AutoModelForMaskedLM.from_pretrained(converted).save_pretrained(tmp_path / "again")
    assert not [name for name in os.listdir(tmp_path / "again") if name.endswith(".py")]
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_a_reverted_model_saves_as_a_stock_one(converted: Path, tmp_path: Path) -> None:
    model = hf_linattn.revert(AutoModelForMaskedLM.from_pretrained(converted))
    model.save_pretrained(tmp_path / "stock")
    values = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert values["model_type"] == "bert"
    assert values["architectures"] == ["BertForMaskedLM"]
    assert "linear_attention" not in values
    loaded = BertForMaskedLM.from_pretrained(tmp_path / "stock")
    assert torch.equal(logits(loaded, **BERT.inputs()), logits(BERT.build(), **BERT.inputs()))
    assert largest(logits(VIT.build(), **VIT.inputs())) > 0


# -- the Hub --------------------------------------------------------------------------------------------------------
PUSH = """
import os, sys, tempfile
from recipes.local_hub import LocalHub
home = tempfile.mkdtemp()
with LocalHub() as hub:
    os.environ.pop("HF_HUB_OFFLINE", None)
    os.environ.update(hub.environment(home))
    sys.path.insert(0, "tests")
    import torch
    from cases import BERT, logits
    from huggingface_hub import HfApi, ModelCard
    from transformers import AutoModelForMaskedLM
    import hf_linattn

    api, repo = HfApi(), "local/bert-favor"
    model = hf_linattn.convert(BERT.build(), BERT.settings("favor_plus"))
    expected = logits(model, **BERT.inputs())
    model.push_to_hub("bert-favor", max_shard_size="10KB", commit_message="sharded", tags=["mine"])
    files = set(api.list_repo_files(repo))
    assert "model.safetensors.index.json" in files and "config.json" in files, files
    card = ModelCard.load(repo)
    assert "mine" in card.data.tags and "linear-attention" in card.data.tags, card.data.tags
    assert "favor_plus" in card.text
    loaded = AutoModelForMaskedLM.from_pretrained(repo)
    assert type(loaded) is hf_linattn.LinAttnBertForMaskedLM
    assert torch.equal(logits(loaded, **BERT.inputs()), expected)

    # In one file: the shards must go, or a client could load them with the new config.
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight.mul_(2)
    expected = logits(model, **BERT.inputs())
    folder = os.path.join(home, "bert-favor")
    model.save_pretrained(folder, push_to_hub=True, commit_message="one file")
    files = set(api.list_repo_files(repo))
    assert not any("-of-" in name or "index" in name for name in files), files
    assert not [name for name in files if name.startswith("_")], files
    loaded = AutoModelForMaskedLM.from_pretrained(repo)
    assert torch.equal(logits(loaded, **BERT.inputs()), expected)

    # A card that a person has written stays.
    ModelCard("---\\ntags: [a]\\n---\\n# My own words").push_to_hub(repo)
    loaded.push_to_hub(repo, revision="second")
    assert "My own words" in ModelCard.load(api.hf_hub_download(repo, "README.md", revision="second")).content
    from_branch = AutoModelForMaskedLM.from_pretrained(repo, revision="second")
    assert torch.equal(logits(from_branch, **BERT.inputs()), expected)
    loaded.set_attn_implementation("sdpa")  # says nothing about the checkpoint
    loaded.push_to_hub(repo)
    assert AutoModelForMaskedLM.from_pretrained(repo).config._attn_implementation == "favor_plus"
    print("pushed")
"""


@pytest.mark.hub
def test_push_to_hub() -> None:
    """Against a local server with the real client, in a process of its own: it reads the address at import."""
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    out = subprocess.run([sys.executable, "-c", PUSH], cwd=root, env=env, capture_output=True, text=True)
    assert out.stdout.endswith("pushed\n"), out.stderr[-4000:]
