"""Convert, push, load back by name: the real client against a local Hub."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import KINDS
from hub_server import environment, run, run_with_hub
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
        run(
            [
                "-c",
                "from huggingface_hub import snapshot_download; import pathlib;"
                " folder = pathlib.Path(snapshot_download('other/model'));"
                f" assert (folder / 'model.safetensors').read_bytes() == {content!r};"
                " assert (folder / 'config.json').read_text() == '{}'",
            ],
            environment(**hub.environment(tmp_path), HF_HUB_OFFLINE="0"),
        )
