"""Convert, push, load back by name: the real client against a local Hub."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import KINDS
from forked_programs import run_forked
from hub_server import environment, run_with_hub
from huggingface_hub import ModelCard

from recipes.local_hub import LocalHub

pytestmark = pytest.mark.hub

ROUND_TRIP = """
import sys
import torch
import hf_linattn
from cases import BY_NAME, converted
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForSequenceClassification

auto = {"bert-classifier": AutoModelForSequenceClassification, "gpt2": AutoModelForCausalLM,
        "vit": AutoModelForImageClassification}
for kind in KINDS:
    for name, auto_class in auto.items():
        case = BY_NAME[name]
        stock = case.build()(**case.inputs()).logits
        model = converted(case, kind, layers=[0])  # ViT reads its answer from [CLS], which is exact in the last layer
        model.push_to_hub(f"me/{name}-{kind}")
        loaded = auto_class.from_pretrained(f"me/{name}-{kind}").eval()
        assert type(loaded) is type(model), type(loaded)
        with torch.no_grad():
            want, got = model(**case.inputs()).logits, loaded(**case.inputs()).logits
        # Not bit by bit: loaded tensors are not aligned in memory, and small matrix products then round differently.
        assert (want - got).abs().max() < 1e-5, (kind, name)
        state = loaded.state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items()), (kind, name)
        assert (want - stock).abs().max() > 1e-4, (kind, name)
"""


def test_push_and_load_back_by_name(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, 'tests'); KINDS = {KINDS!r}" + ROUND_TRIP
    hub = run_with_hub(code, tmp_path)

    assert len(hub.repos) == 3 * len(KINDS)
    for name, repo in hub.repos.items():
        files = repo.commits[repo.branches["main"]]
        assert {"README.md", "config.json", "model.safetensors"} <= set(files)
        assert not [path for path in files if path.endswith((".bin", ".pt", ".pkl"))]
        card = ModelCard(hub.blobs[files["README.md"]].decode())
        assert card.data.library_name == "transformers"
        assert {"linear-attention", name.rsplit("-", 1)[1]} <= set(card.data.tags)
        assert f'from_pretrained("{name}")' in card.text


def test_missing_repository_and_file_are_told_apart(tmp_path: Path) -> None:
    run_with_hub(
        """
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
api = HfApi()
for arguments, expected in [(("me/none", "a"), RepositoryNotFoundError), (("me/some", "a"), EntryNotFoundError)]:
    api.create_repo("me/some", exist_ok=True)
    try:
        hf_hub_download(*arguments)
    except expected:
        continue
    raise SystemExit(f"no {expected}")
try:
    hf_hub_download("me/some", "a", revision="none")
except RevisionNotFoundError:
    pass
else:
    raise SystemExit("no RevisionNotFoundError")
""",
        tmp_path,
    )


def test_private_repositories_and_deletion(tmp_path: Path) -> None:
    """A private repository is there for those with a token only, a deleted one for nobody."""
    hub = run_with_hub(
        """
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError
api = HfApi()

def missing(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except RepositoryNotFoundError:
        return True
    return False

api.create_repo("me/open")
for name in ("me/hidden", "me/kept"):
    api.create_repo(name, private=True)
    api.upload_file(path_or_fileobj=b"content", path_in_repo="a.bin", repo_id=name)
assert [api.model_info(name).private for name in ("me/open", "me/hidden")] == [False, True]
assert not missing(api.model_info, "me/open", token=False)
assert missing(api.model_info, "me/hidden", token=False)
assert missing(hf_hub_download, "me/hidden", "a.bin", token=False)
assert open(hf_hub_download("me/hidden", "a.bin"), "rb").read() == b"content"

assert missing(api.delete_repo, "me/hidden", token=False)
assert api.repo_exists("me/hidden")
api.delete_repo("me/hidden")
assert not api.repo_exists("me/hidden") and api.repo_exists("me/open")
assert missing(api.delete_repo, "me/hidden")
api.delete_repo("me/hidden", missing_ok=True)
""",
        tmp_path,
    )

    assert {name: repo.private for name, repo in hub.repos.items()} == {"me/open": False, "me/kept": True}


def test_push_to_a_private_repository(tmp_path: Path) -> None:
    hub = run_with_hub(
        """
import sys; sys.path.insert(0, "tests")
from cases import BERT, converted
converted(BERT, "favor_plus").push_to_hub("me/private", private=True)
converted(BERT, "favor_plus").push_to_hub("me/public")
""",
        tmp_path,
    )

    assert {name: repo.private for name, repo in hub.repos.items()} == {"me/private": True, "me/public": False}


def test_a_repository_of_somebody_else(tmp_path: Path) -> None:
    content = b"x" * 100
    with LocalHub() as hub:
        hub.add("other/model", {"config.json": b"{}", "model.safetensors": content})
        run_forked(
            [
                "-c",
                "from huggingface_hub import snapshot_download; import pathlib;"
                " folder = pathlib.Path(snapshot_download('other/model'));"
                f" assert (folder / 'model.safetensors').read_bytes() == {content!r};"
                " assert (folder / 'config.json').read_text() == '{}'",
            ],
            environment(**hub.environment(tmp_path), HF_HUB_OFFLINE="0"),
        )


# -- what is uploaded ----------------------------------------------------------------------------------------------
SAVE_AND_PUSH = """
import os, pathlib, sys, tempfile
sys.path.insert(0, "tests")
from cases import BERT, GPT2, VIT
import hf_linattn
from transformers import PreTrainedTokenizerFast
from tokenizers import Tokenizer, models

home = pathlib.Path(tempfile.mkdtemp())
(home / "passwords").write_text("secret")
def folder(name):
    path = home / name
    (path / "runs").mkdir(parents=True)
    for file in (".env", "id_rsa", "notes.md", "optimizer.pt", "config.json.bak", "runs/log", "model.key", ".netrc",
                 "adapter_model.safetensors", "tokenizer.json", "model.old.safetensors", "_incomplete_save_x"):
        (path / file).write_text("mine")
    for file in ("link", "README.md", "generation_config.json", "model-00001-of-00009.safetensors"):
        (path / file).symlink_to(home / "passwords")
    (path / "deep").symlink_to(home)
    return path

for case in (BERT, GPT2, VIT):
    for options in ({}, {"max_shard_size": "40KB"}, {"variant": "fp16"}):
        name = "-".join([case.name, *options])
        stock = case.build()
        stock.save_pretrained(home / ("stock-" + name), push_to_hub=True, repo_id="stock/" + name, **options)
        model = hf_linattn.convert(case.build(), case.settings("favor_plus" if case is not VIT else "eva"))
        model.save_pretrained(folder("ours-" + name), push_to_hub=True, repo_id="ours/" + name, **options)
        assert (home / "passwords").read_text() == "secret"
model.push_to_hub("ours/direct")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")))
tokenizer.push_to_hub("ours/direct")
model.push_to_hub("ours/direct")
"""


def test_nothing_but_what_was_saved_is_uploaded(tmp_path: Path) -> None:
    """What the stock model uploads from an empty folder, whatever else lies in it; links are not followed."""
    hub = run_with_hub(SAVE_AND_PUSH, tmp_path)
    names = [name.removeprefix("ours/") for name in hub.repos if name.startswith("ours/") and "direct" not in name]
    assert len(names) == 9
    for name in names:
        ours, stock = (
            repo.commits[repo.branches["main"]] for repo in (hub.repos[f"ours/{name}"], hub.repos[f"stock/{name}"])
        )
        shards = [path for path in ours if "-of-" in path]
        assert bool(shards) == ("max_shard_size" in name)
        assert set(ours) - set(shards) == {path for path in stock if "-of-" not in path}
        card = ModelCard(hub.blobs[ours["README.md"]].decode())
        assert "## Limits" in card.text
    direct = hub.repos["ours/direct"].commits[hub.repos["ours/direct"].branches["main"]]
    assert {"tokenizer.json", "README.md", "config.json", "model.safetensors"} <= set(direct)
    assert "## Limits" in hub.blobs[direct["README.md"]].decode()
    published = {
        hub.blobs[digest]
        for name, repo in hub.repos.items()
        if name.startswith("ours/")
        for files in repo.commits.values()
        for digest in files.values()
    }
    assert not published & {b"mine", b"secret"}


OTHER_FILES = """
import sys
sys.path.insert(0, "tests")
from cases import BERT
import hf_linattn
model = hf_linattn.convert(BERT.build(), BERT.settings("favor_plus"))
model.push_to_hub("me/push")
model.save_pretrained(sys.argv[1], push_to_hub=True, repo_id="me/save")
model.save_pretrained(sys.argv[1], push_to_hub=True, repo_id="me/variant", variant="fp16")
"""
THEIRS = {
    "model.bf16.safetensors",
    "onnx/model.safetensors",
    "model-of-thoughts-of-mine.safetensors",
    "model-card-of-us.safetensors",
    "sub/model-00001-of-00002.safetensors",
    "pytorch_model-notes-of-me.bin",
    "adapter_model.safetensors",
    "training_args.bin",
    "tokenizer.json",
    ".env.example",
    "handler.py",
}
STALE = {
    "": {"model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin"},
    "fp16": {"model.fp16.safetensors", "pytorch_model.fp16.bin", "model.safetensors.index.fp16.json"},
}


def test_files_of_others_in_the_repository_stay(tmp_path: Path) -> None:
    """Gone are weights that would be loaded together with, or instead of, the new ones; nothing else."""
    there = THEIRS | STALE[""] | STALE["fp16"]
    with LocalHub() as hub:
        for name in ("me/push", "me/save", "me/variant"):
            hub.add(name, dict.fromkeys(there, b"theirs"))
        run_forked(
            ["-c", OTHER_FILES, str(tmp_path / "out")], environment(**hub.environment(tmp_path), HF_HUB_OFFLINE="0")
        )
    for name, variant in (("me/push", ""), ("me/save", ""), ("me/variant", "fp16")):
        files = hub.repos[name].commits[hub.repos[name].branches["main"]]
        weights = f"model.{variant}.safetensors" if variant else "model.safetensors"
        assert set(files) == (there - STALE[variant]) | {weights, "config.json", "README.md"}, name
        kept = {path for path, digest in files.items() if hub.blobs[digest] == b"theirs"}
        assert kept == there - STALE[variant], name


BROKEN_CARDS = """
import pathlib, sys
sys.path.insert(0, "tests")
from cases import BERT
import hf_linattn
model = hf_linattn.convert(BERT.build(), BERT.settings("favor_plus"))
folder = pathlib.Path(sys.argv[1])
for place in ("source", "folder", "hub"):
    (folder / place).mkdir(parents=True)
    if place != "hub":
        (folder / place / "README.md").write_text("---\\nlicense: [mit\\n---\\n# Mine\\n")
model.config._name_or_path = str(folder / "source")
for place in ("out", "folder", "hub"):
    model.save_pretrained(folder / place, push_to_hub=True, repo_id="me/" + place, tags=["more"])
"""


def test_a_broken_card_does_not_lose_the_upload(tmp_path: Path) -> None:
    """Of the base model, in the folder, on the Hub: a warning names it, and it is not overwritten."""
    broken = b"---\nlicense: [mit\n---\n# Mine\n"
    with LocalHub() as hub:
        hub.add("me/hub", {"README.md": broken})
        done = run_forked(
            ["-c", BROKEN_CARDS, str(tmp_path)], environment(**hub.environment(tmp_path), HF_HUB_OFFLINE="0")
        )
    assert "Traceback" not in done.stderr
    for said in ("License and language of the base model are not in the card", "No model card is uploaded"):
        assert f"{said}: '{tmp_path}" in done.stderr
    files = {
        place: hub.repos[f"me/{place}"].commits[hub.repos[f"me/{place}"].branches["main"]]
        for place in ("out", "folder", "hub")
    }
    assert all({"config.json", "model.safetensors"} <= set(found) for found in files.values())
    assert "more" in ModelCard(hub.blobs[files["out"]["README.md"]].decode()).data.tags
    assert "README.md" not in files["folder"]
    assert (tmp_path / "folder" / "README.md").read_bytes() == hub.blobs[files["hub"]["README.md"]] == broken
