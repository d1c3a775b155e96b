"""Writing a checkpoint so that an interruption cannot mix two of them, and uploading it with a model card."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..integrations.seams import CONFIG_NAME

# Not uploaded by a Trainer, which leaves out names that start with an underscore.
STAGING_PREFIX = "_incomplete_save_"

# Weight files that would be loaded instead of, or together with, the new ones.
STALE_WEIGHTS = [
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model-*-of-*.bin",
    "pytorch_model.bin.index.json",
]


def save_atomically(
    save: Callable[..., None], folder: str | os.PathLike[str], arguments: dict[str, Any], *, writes: bool
) -> None:
    """Save into a subfolder first, then put the files in place, config.json last.

    Interrupted before the old config.json is removed, the folder holds the old checkpoint; after that it has no
    config.json and does not load, until everything else is in place.

    Args:
        save: The stock `save_pretrained`.
        writes: Whether this process writes files; the others still take part in gathering the weights.
    """
    target = Path(folder)
    if target.is_file():
        raise NotADirectoryError(f"save_directory must be a folder; got the file {os.fspath(folder)!r}.")
    if not writes:
        save(folder, **arguments)
        return
    target.mkdir(parents=True, exist_ok=True)
    for left_over in target.glob(f"{STAGING_PREFIX}*"):
        shutil.rmtree(left_over, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=target))
    try:
        save(staging, **arguments)
        _publish(staging, target, arguments.get("variant"))
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, target: Path, variant: str | None) -> None:
    names = sorted(os.listdir(staging))
    if CONFIG_NAME in names:  # not so for adapters, which leave the model's own files alone
        (target / CONFIG_NAME).unlink(missing_ok=True)
        for path in target.iterdir():
            if path.is_file() and _is_weight_file(path.name, variant):
                path.unlink()
    for name in names:
        if name != CONFIG_NAME:
            os.replace(staging / name, target / name)
    if CONFIG_NAME in names:
        os.replace(staging / CONFIG_NAME, target / CONFIG_NAME)


def _is_weight_file(name: str, variant: str | None) -> bool:
    """Whether a file holds weights, or an index of them, of the given variant."""
    infix = "" if variant is None else rf"\.{re.escape(variant)}"
    shard = r"(-\d{5}-of-\d{5})?"
    # Transformers puts the variant before the shard's number in new files and after it in old ones.
    return bool(
        re.fullmatch(rf"(model|pytorch_model)({infix}{shard}|{shard}{infix})\.(safetensors|bin)", name)
    ) or bool(re.fullmatch(rf"(model\.safetensors|pytorch_model\.bin)\.index{infix}\.json", name))


def push_folder(
    model: Any,
    folder: str | os.PathLike[str] | None,
    repo_id: str,
    *,
    max_shard_size: int | str | None = "50GB",
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | None = None,
) -> str:
    """Upload a saved model with its card in one commit, and remove weight files of an earlier one from the repository.

    Args:
        folder: A folder the model has just been saved to, or `None` to save it to a temporary one.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        if folder is None:
            model.save_pretrained(scratch, max_shard_size=max_shard_size)
        else:
            for name in os.listdir(folder):
                path = Path(folder, name)
                if path.is_file():
                    os.symlink(path.resolve(), Path(scratch, name))
        _write_card(model, scratch, api, repo_id, revision, tags)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=scratch,
            commit_message=commit_message or "Upload model",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            delete_patterns=STALE_WEIGHTS,
        )
    return str(commit)


def _write_card(model: Any, folder: str, api: Any, repo_id: str, revision: str | None, tags: list[str] | None) -> None:
    """README.md: the one in the folder; else a rendered card, which keeps what a person wrote on the Hub."""
    from huggingface_hub import ModelCard

    from ..hub import write_card

    path = Path(folder, "README.md")
    if not path.exists():
        if api.file_exists(repo_id, path.name, revision=revision):
            shutil.copyfile(api.hf_hub_download(repo_id, path.name, revision=revision), path)
        write_card(model, folder, repo_id=repo_id)
    if tags:
        card = ModelCard.load(path)
        card.data.tags = sorted({*(card.data.tags or []), *([tags] if isinstance(tags, str) else tags)})
        content = str(card)
        path.unlink()  # it may be a link to the user's own file
        path.write_text(content, encoding="utf-8")
