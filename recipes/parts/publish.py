"""What a recipe uploads: model, tokenizer and card, by name. Nothing else that lies in the output folder."""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import HubStrategy

from hf_linattn.models.publishing import is_own, model_files

logger = logging.getLogger("hf_linattn.recipes")

# What a run goes on from. Not training_args.bin: it may hold a token, and is not needed.
RESUME_FILES = re.compile(
    r"(optimizer|scheduler|scaler)\.(pt|bin)|rank\d+-of-\d+-optimizer\.pt|rng_state(_\d+)?\.pth|trainer_state\.json"
)


def upload(
    files: Iterable[Path], tokenizer: PreTrainedTokenizerBase | None, *, blocking: bool, token: Any, **commit: Any
) -> Any:
    """Upload copies of files, and a tokenizer, in one commit. Returns the commit, or a `Future` of it."""
    scratch = tempfile.TemporaryDirectory()
    for path in files:
        shutil.copyfile(path, Path(scratch.name, path.name))
    if tokenizer is not None:
        tokenizer.save_pretrained(scratch.name)
    pushed = HfApi(token=token).upload_folder(folder_path=scratch.name, run_as_future=not blocking, **commit)
    if isinstance(pushed, Future):
        pushed.add_done_callback(lambda _: scratch.cleanup())
    else:
        scratch.cleanup()
    return pushed


class Publisher(TrainerCallback):
    """Pushes after every save as `--hub_strategy` says, in the background, in place of the `Trainer`.

    The `Trainer` itself, which uploads its whole output folder, is told to push at the end only.
    """

    def __init__(self, args: TrainingArguments) -> None:
        self.strategy = HubStrategy(args.hub_strategy)
        args.hub_strategy = HubStrategy.END
        self.trainer: Trainer | None = None
        self.pending: list[Future[Any]] = []

    def push(self, blocking: bool = True, **commit: Any) -> Any:
        """The model in the output folder, with its card."""
        assert self.trainer is not None
        return self._upload(Path(self.trainer.args.output_dir), blocking, **commit)

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if not (args.push_to_hub and state.is_world_process_zero) or self.strategy == HubStrategy.END:
            return
        if any(not job.done() for job in self.pending) and not args.hub_always_push:
            return
        self.finish()
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        message = f"Training in progress, step {state.global_step}"
        self.pending.append(self._upload(folder, False, commit_message=message))
        if self.strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            where = "last-checkpoint" if self.strategy == HubStrategy.CHECKPOINT else folder.name
            resume = [path for path in folder.iterdir() if RESUME_FILES.fullmatch(path.name) and is_own(path)]
            self.pending.append(self._upload(folder, False, where, resume, commit_message=f"{message}, checkpoint"))

    def finish(self) -> None:
        """Wait for what is under way, and tell what did not arrive."""
        for job in self.pending:
            if error := job.exception():
                logger.warning("A push during the training failed: %s", error)
        self.pending.clear()

    def _upload(
        self, folder: Path, blocking: bool, where: str | None = None, resume: Iterable[Path] = (), **commit: Any
    ) -> Any:
        trainer = self.trainer
        assert trainer is not None
        card = Path(trainer.args.output_dir, "README.md")
        files = [*model_files(folder), *resume, *([card] if is_own(card) and where is None else [])]
        options = {"token": trainer.args.hub_token, "revision": getattr(trainer.args, "hub_revision", None)}
        options |= {name: value for name, value in commit.items() if value is not None}
        return upload(
            files,
            trainer.processing_class,
            blocking=blocking,
            repo_id=trainer.hub_model_id,
            path_in_repo=where,
            **options,
        )
