"""Uploading what a save has written, and a model card. Nothing else leaves the machine."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..hub import BrokenCardError, add_tags, card_for, name_repository, read_card
from .saving import is_weight_file

logger = logging.getLogger(__name__)

CARD = "README.md"
INDEX = "model.safetensors.index.json"
MODEL_FILES = ["config.json", "generation_config.json", "model.safetensors", INDEX]


def model_files(folder: Path) -> list[Path]:
    """The files that make up a saved model. A link is none of them, whatever its name."""
    names = list(MODEL_FILES)
    if is_own(folder / INDEX):
        shards = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        names += sorted({name for name in shards if re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", name)})
    return [folder / name for name in names if is_own(folder / name)]


def push_folder(
    model: Any,
    folder: str | os.PathLike[str],
    names: Iterable[str],
    repo_id: str,
    *,
    variant: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: str | list[str] | None = None,
    card: bool = True,
) -> str:
    """Upload files of a saved model with its card in one commit.

    Weights of an earlier save of the same variant, which would be loaded instead of or together with the new ones, are
    removed from the repository; everything else that is there stays.

    Args:
        names: The files that the save wrote. Nothing else in `folder` is read, but a README.md. Links are left out.
        card: Without it the card on the Hub, if there is one, stays as it is.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    files = {name: path for name in sorted(names) if is_own(path := Path(folder, name)) and name != CARD}
    operations: list[Any] = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
    text = _card(model, Path(folder, CARD), api, repo_id, revision, tags) if card else None
    if text is not None:
        operations.append(CommitOperationAdd(CARD, text.encode("utf-8")))
    if any(is_weight_file(name, variant) for name in files):
        present = api.list_repo_files(repo_id, revision=revision)
        stale = [name for name in present if is_weight_file(name, variant) and name not in files]
        operations += [CommitOperationDelete(name, is_folder=False) for name in stale]
    commit = api.create_commit(
        repo_id,
        operations,
        commit_message=commit_message or "Upload model",
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
    )
    return str(commit)


def is_own(path: Path) -> bool:
    """Whether this is a file, and not a link to one that may be anywhere."""
    return path.is_file() and not path.is_symlink()


def _card(
    model: Any, path: Path, api: Any, repo_id: str, revision: str | None, tags: str | list[str] | None
) -> str | None:
    """The one in the folder; else a rendered card, which keeps what a person wrote on the Hub. `None`: no upload."""
    try:
        if is_own(path):
            text = name_repository(read_card(path), repo_id)
        else:
            own = None
            if api.file_exists(repo_id, CARD, revision=revision):
                own = read_card(Path(api.hf_hub_download(repo_id, CARD, revision=revision)))
            text = card_for(model, own, repo_id=repo_id)
        return add_tags(text, [tags] if isinstance(tags, str) else tags or [])
    except BrokenCardError as error:
        logger.warning("No model card is uploaded: %s", error)
        return None
