"""Runs of recipes on forked processes, and the undisturbed ones that they are compared with."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.kill_parts.groups import GroupEnded, Kill, run_group
from scripts.kill_parts.recipes import RECIPES, build, command_line
from scripts.kill_parts.weights import difference

__all__ = ["RECIPES", "Groups", "Kill", "contents"]


class Groups:
    """Starts runs of recipes in one folder of tiny models and data.

    Every run is killed after `LIMIT` seconds of `scripts.kill_parts.groups`; a hanging one is seen by its status.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[Any, Path] = {}
        build(folder)

    def run(
        self, recipe: str, place: Path, *changes: str, main: Callable[..., Any] | None = None, **options: Any
    ) -> GroupEnded:
        """Run a recipe with its output in `place/output`; two processes if nothing else is said."""
        importlib.import_module(recipe)
        argv = command_line(recipe, self.folder, place / "output", *changes)
        return run_group(main or recipe, argv, place, place / "output", **options)

    def undisturbed(self, recipe: str, *changes: str, processes: int = 2) -> Path:
        """The output folder of a run that nothing disturbed, made once."""
        key = (recipe, processes, changes)
        if key not in self.made:
            place = self.folder / f"undisturbed-{len(self.made)}"
            ended = self.run(recipe, place, *changes, processes=processes)
            assert ended.statuses == [0] * processes, "\n".join(ended.logs)
            self.made[key] = place / "output"
        return self.made[key]

    def assert_goes_on(self, recipe: str, place: Path, *changes: str, processes: int = 2) -> GroupEnded:
        """The same command line ends with the weights of the undisturbed run."""
        again = self.run(recipe, place, *changes, processes=processes)
        assert again.statuses == [0] * processes, "\n".join(again.logs)
        whole = self.undisturbed(recipe, *changes, processes=processes)
        assert not difference(place / "output" / "model.safetensors", whole / "model.safetensors")
        assert not (place / "output" / "_before_training").exists()
        return again


def contents(folder: Path) -> dict[str, str]:
    """A digest of every file below a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
