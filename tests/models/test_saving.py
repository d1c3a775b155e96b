"""What `save_pretrained` and `push_to_hub` write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import BERT, VIT, largest, logits
from safetensors.torch import load_file
from transformers import (
    AutoModelForMaskedLM,
    BertForMaskedLM,
)

import hf_linattn
from hf_linattn.errors import CheckpointError


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
