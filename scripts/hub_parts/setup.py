"""What comes before the check: a Hub, a user, a device, and what will be done.

Nothing of Hugging Face is imported with this file: the client reads the address of its Hub on import.
"""

from __future__ import annotations

import logging
import os
import platform
import tempfile
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console


def local_hub(stack: ExitStack) -> Any:
    """A Hub of this machine, which the client is told of before it is imported."""
    from recipes.local_hub import LocalHub

    home = stack.enter_context(tempfile.TemporaryDirectory())
    hub = stack.enter_context(LocalHub())
    os.environ.pop("HF_HUB_OFFLINE", None)
    os.environ.pop("HF_HUB_CACHE", None)
    os.environ.update(hub.environment(home))
    return hub


def fill(hub: Any) -> None:
    from .models import sentences
    from .small_checkpoints import small_checkpoints

    for repo, files in small_checkpoints(sentences()).items():
        hub.add(repo, files)


def be_quiet() -> None:
    """Leave the screen to one line for each part."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("hf_linattn").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def who() -> str:
    """The user's name on the Hub; ends the program with one sentence if there is no Hub or no token."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        found = HfApi().whoami()
    except LocalTokenNotFoundError:
        _give_up("There is no token for the Hub: run `hf auth login`, or set HF_TOKEN, to one that may write.")
    except OfflineModeIsEnabled:
        _give_up("HF_HUB_OFFLINE is set, and this needs the Hub: unset it, or use --rehearse.")
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            _give_up("The Hub does not accept the token: run `hf auth login` again.")
        _give_up(f"The Hub answers with status {status}: try again later, or use --rehearse.")
    except Exception as error:  # of whatever library the client uses for its connections
        _give_up(f"The Hub cannot be reached ({type(error).__name__}): this needs a network; --rehearse does not.")
    role = found.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        _give_up("The token may only read: make one that may write at https://huggingface.co/settings/tokens.")
    return str(found["name"])


def _give_up(sentence: str) -> NoReturn:
    typer.echo(f"error: {sentence}", err=True)
    raise typer.Exit(2)


def announce(
    console: Console, models: list[Any], kinds: list[str], repositories: Any, rehearse: bool, path: Path
) -> None:
    size = sum(model.megabytes for model in models) / 1000
    names = [repositories.name(model.name, kind) for model in models for kind in kinds]
    console.print("[bold]A REHEARSAL[/] on a Hub inside this process." if rehearse else "On the Hugging Face Hub:")
    console.print(f"It reads {', '.join(model.repo for model in models)}")
    console.print("and makes private repositories, which are deleted again, after Ctrl-C too:")
    for name in names:
        console.print(f"  {name}")
    if not rehearse:
        console.print(
            f"It downloads up to {size:.1f} GB (kept in the usual cache), and uploads {size * len(kinds):.1f} GB"
        )
        console.print("and downloads that again. Nothing else on the Hub is changed.")
    console.print(f"Results go to {path} as they come.\n", soft_wrap=True)


def pick_device(wanted: str | None) -> str:
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # the Trainer would spread a batch over all of them
    import torch

    if wanted not in (None, "cpu", "cuda"):
        raise typer.BadParameter(f"--device must be cpu or cuda; got {wanted!r}")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device cuda needs a GPU that PyTorch can use")
    return wanted or ("cuda" if torch.cuda.is_available() else "cpu")


def versions(device: str) -> dict[str, str]:
    from importlib.metadata import version

    import torch
    import transformers

    import hf_linattn

    return {
        "python": platform.python_version(),
        "hf_linattn": hf_linattn.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **{name: version(name) for name in ("huggingface_hub", "safetensors", "accelerate")},
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu ({platform.machine()})",
    }


def split_names(text: str, known: tuple[str, ...], option: str) -> list[str]:
    found = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found or not set(found) <= set(known):
        raise typer.BadParameter(f"{option} must be some of {','.join(known)}; got {text!r}")
    return found
