"""`hf-linattn push` and `info` against a local Hub, with the real client."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_server import run_with_hub
from huggingface_hub import ModelCard
from shell import shell

from recipes.local_hub import LocalHub

pytestmark = pytest.mark.hub

COMMANDS = """
import contextlib, io, json, sys
from hf_linattn.cli.app import app

def shell(*arguments, status=0):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            app(list(arguments))
        except SystemExit as end:
            assert end.code == status, end.code
    return printed.getvalue()
"""


def files(hub: LocalHub, name: str, branch: str = "main") -> dict[str, bytes]:
    repo = hub.repos[name]
    return {path: hub.blobs[digest] for path, digest in repo.commits[repo.branches[branch]].items()}


@pytest.fixture
def trained(folder: Path, tmp_path: Path) -> Path:
    """A checkpoint with a card of its transfer, and a file that is nobody's business."""
    path = tmp_path / "trained"
    data = ["--inputs", folder / "text.txt", "--max-length", "40"]
    shell("transfer", folder / "favor", path, *data, "--steps", "2", "--held-out", "4")
    (path / "secret.txt").write_text("secret")
    (path / ".eval_results").mkdir()
    (path / ".eval_results" / "sst2.yaml").write_text("[]\n")
    (path / ".eval_results" / "secret.txt").write_text("secret")
    (path / ".eval_results" / "link.yaml").symlink_to(path / "secret.txt")
    (path / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Link"}]')
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text("{}")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "config.json").write_text("secret")
    (path / "2_Link").symlink_to(tmp_path / "private")
    return path


def test_what_is_uploaded(folder: Path, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "told").mkdir()
    code = f"""
told = json.loads(shell("push", {str(trained)!r}, "me/trained", "--private", "--json"))
assert told["repo_id"] == "me/trained" and told["commit"].startswith("http"), told
assert "secret.txt" not in told["files"]
assert "Uploaded " in shell("push", {str(trained)!r}, "me/branches", "--revision", "second", "--message", "A second")
shell("push", {str(trained)!r}, "me/bare", "--no-card")
shell("push", "./nowhere", "me/nowhere", status=2)
shell("info", "me/unknown", status=2)

# The weights of `info` stay on the Hub.
found = json.loads(shell("info", "me/trained", "--json"))
assert found["kind"] == "favor_plus" and found["missing"] == [] and found["dtypes"], found
from transformers import AutoModelForCausalLM, AutoTokenizer
assert type(AutoModelForCausalLM.from_pretrained("me/trained")).__name__ == "LinAttnGPT2LMHeadModel"
assert AutoTokenizer.from_pretrained("me/trained")("w1 w2")["input_ids"]
shell("compare", "me/trained", "--inputs", {str(folder / "text.txt")!r}, "--rows", "2")
"""
    hub = run_with_hub(COMMANDS + code, tmp_path / "home")
    uploaded = files(hub, "me/trained")
    written = {path.relative_to(trained).as_posix() for path in trained.rglob("*") if path.is_file()}
    written -= {"secret.txt", ".eval_results/secret.txt", ".eval_results/link.yaml", "2_Link/config.json"}
    assert written <= set(uploaded)
    assert not any(b"secret" in content for content in uploaded.values())
    assert {name: uploaded[name] for name in written - {"README.md"}} == {
        name: (trained / name).read_bytes() for name in written - {"README.md"}
    }
    card = ModelCard(uploaded["README.md"].decode())
    assert "## Attention transfer" in card.text  # as it was written beside the checkpoint
    assert 'from_pretrained("me/trained")' in card.text  # but for the name
    assert hub.repos["me/trained"].private
    assert not hub.repos["me/branches"].private
    assert "model.safetensors" in files(hub, "me/branches", "second")
    assert "model.safetensors" not in files(hub, "me/branches")
    assert "README.md" not in files(hub, "me/bare")
    assert "me/nowhere" not in hub.repos


def test_a_card_of_ones_own_and_none(trained: Path, tmp_path: Path) -> None:
    mine = '# Mine\n\n    from_pretrained("path/or/name")\n'
    (trained / "README.md").write_text(mine)
    code = f"""
import pathlib
shell("push", {str(trained)!r}, "me/mine")
pathlib.Path({str(trained)!r}, "README.md").unlink()
shell("push", {str(trained)!r}, "me/written")
pathlib.Path({str(trained)!r}, "model.safetensors").unlink()
shell("push", {str(trained)!r}, "me/incomplete", status=2)
"""
    hub = run_with_hub(COMMANDS + code, tmp_path / "home")
    assert files(hub, "me/mine")["README.md"].decode() == mine
    assert 'from_pretrained("me/written")' in files(hub, "me/written")["README.md"].decode()
    assert "me/incomplete" not in hub.repos
