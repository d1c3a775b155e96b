"""The private repositories of one run: named in advance, and deleted by it whatever happens."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

TRIES = 3


class Repositories:
    """Names, and which of them may exist.

    Args:
        api: An `HfApi`.
        user: Whose repositories they are.
        run: A random word in all their names.
        changed: Called whenever a repository may have come or has gone.
    """

    def __init__(self, api: Any, user: str, run: str, changed: Callable[[], None] = lambda: None) -> None:
        self.api, self.user, self.run, self.changed = api, user, run, changed
        self.claimed: list[str] = []
        self.deleted: list[str] = []

    def name(self, model: str, kind: str) -> str:
        return f"{self.user}/hf-linattn-check-{self.run}-{model}-{kind}"

    @property
    def left(self) -> list[str]:
        """Repositories that may still exist."""
        return [name for name in self.claimed if name not in self.deleted]

    def claim(self, name: str) -> None:
        """Call this before a repository is made: from now on it is ours to delete.

        Raises: `RuntimeError` if there is one of that name already, which is then not ours.
        """
        if self.api.repo_exists(name):
            raise RuntimeError(f"{name} exists already; it is left as it is")
        self.claimed.append(name)
        self.changed()

    def delete(self, name: str) -> None:
        """Delete a repository that was claimed, and make sure that it is gone."""
        if name not in self.claimed:
            raise ValueError(f"{name} was not made by this run")
        self.api.delete_repo(name, missing_ok=True)  # claimed is not made: the push may have failed before
        if self.api.repo_exists(name):
            raise RuntimeError(f"{name} is still there after its deletion")
        self.deleted.append(name)
        self.changed()

    def delete_all(self, wait: float = 2.0) -> dict[str, str]:
        """Delete what is left, trying again where that fails. Returns what could not be deleted, and why."""
        why: dict[str, str] = {}
        for attempt in range(TRIES):
            for name in self.left:
                try:
                    self.delete(name)
                except Exception as error:
                    why[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            if not self.left:
                break
            if attempt + 1 < TRIES:
                time.sleep(wait)
        return {name: why[name] for name in self.left}

    def to_dict(self) -> dict[str, list[str]]:
        return {"made": self.claimed, "deleted": self.deleted, "left": self.left}
