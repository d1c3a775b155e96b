"""`hf-linattn push`: a converted checkpoint and its model card to the Hub."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from ..errors import CheckpointError, ConfigError, InputError
from ..hub.results import RESULTS
from ..integrations.families import is_converted
from ..models.publishing import is_own, model_files, push_folder
from .checkpoints import FailureError, find_processor, read_config
from .embedders import embedder_files
from .options import Json
from .output import print_json, print_line
from .stored import empty_model, stored_tensors

EXAMPLE = "Example: hf-linattn push gpt2-trained me/gpt2-favor --private"


def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A converted checkpoint.", show_default=False)],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="Such as me/gpt2-favor.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make a repository that is new a private one.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to upload to; made if it is not there.", show_default="main")
    ] = None,
    card: Annotated[
        bool, typer.Option("--card/--no-card", help="With the model card, or leave the one there.")
    ] = True,
    message: Annotated[str | None, typer.Option(help="Of the commit.", show_default="Upload model")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="As a pull request.")] = False,
    json: Json = False,
) -> None:
    """Upload a converted checkpoint, its tokenizer and a model card in one commit.

    Of other files in the folder .eval_results and those of sentence-transformers go along, and nothing else. The token
    is that of `hf auth login`, or HF_TOKEN. README.md in the folder is the card; without one it is written.
    """
    if not folder.is_dir():
        raise InputError(f"FOLDER must be a folder with a converted checkpoint; got {str(folder)!r}.")
    config = read_config(str(folder))
    if not is_converted(config):
        raise ConfigError(
            f"{str(folder)!r} is a stock model ({config.model_type!r}). Upload it with: hf upload {repo_id} {folder}"
        )
    model = empty_model(config)
    stored = stored_tensors(str(folder))
    missing = stored.missing(model) if stored else [path for path in ("model.safetensors",)]
    if missing:
        raise CheckpointError(f"The checkpoint in {str(folder)!r} is incomplete: {missing[0]!r} is not there.")
    names = [path.name for path in model_files(folder)] + _processor_files(model, folder)
    beside = {*embedder_files(str(folder)), *(f"{RESULTS}/{path.name}" for path in (folder / RESULTS).glob("*.yaml"))}
    names += [name for name in beside if (folder / name).resolve() == folder.resolve() / name]  # links lead elsewhere
    try:
        address = push_folder(
            model,
            folder,
            names,
            repo_id,
            private=private or None,
            revision=revision,
            commit_message=message,
            create_pr=create_pr,
            card=card,
        )
    except HFValidationError as error:
        raise ConfigError(f"REPO_ID {repo_id!r} cannot be the name of a repository: {error}") from error
    except (HfHubHTTPError, OfflineModeIsEnabled) as error:
        raise FailureError(f"Nothing was uploaded to {repo_id!r}: {error}") from error
    if json:
        print_json({"folder": folder, "repo_id": repo_id, "commit": address, "files": sorted(names)})
    else:
        print_line(f"Uploaded {', '.join(sorted(names))}: {address}")


def _processor_files(model: Any, folder: Path) -> list[str]:
    """The files of the tokenizer or image processor in a folder: those that it would save."""
    processor = find_processor(model, str(folder))
    if processor is None:
        return []
    with tempfile.TemporaryDirectory() as scratch:
        processor.save_pretrained(scratch)
        return [path.name for path in Path(scratch).iterdir() if is_own(folder / path.name)]
