"""Saves that are cut off, or fail, at any of their file operations, and what should be on the disk then."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from cases import BERT
from transformers import AutoModelForMaskedLM

import hf_linattn

State = dict[str, torch.Tensor]
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.chmod", "shutil.copyfile"}


class Disk:
    """Sees every file operation of this process; calls `at` with the number of each that changes something."""

    def __init__(self) -> None:
        self.at: Callable[[int], None] | None = None
        self.on_read: Callable[[str], None] | None = None
        self.count = 0
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and self.on_read is not None and args[1] == "r":
            self.on_read(str(args[0]))
        writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wxa+")
        if self.at is not None and (event in CHANGES or writes):
            self.count += 1
            self.at(self.count)

    @contextlib.contextmanager
    def calling(self, at: Callable[[int], None]) -> Iterator[None]:
        self.count, self.at = 0, at
        try:
            yield
        finally:
            self.at = None


DISK = Disk()


def old_and_new() -> tuple[Any, Any]:
    first = hf_linattn.convert(BERT.build(), BERT.settings("favor_plus"))
    second = hf_linattn.convert(BERT.build(), BERT.settings("favor_sharp", num_features=16), layers=[1])
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(1)
    return first, second


def state(folder: Path, auto: Any = AutoModelForMaskedLM, **options: Any) -> tuple[type, Any, State]:
    model = auto.from_pretrained(folder, **options)
    assert getattr(model.config, "transformers_weights", None) is None
    assert not any("incomplete" in part for part in Path(model.config._name_or_path).parts)
    return type(model), getattr(model.config, "linear_attention", None), model.state_dict()


def same(one: tuple[type, Any, State], other: tuple[type, Any, State]) -> bool:
    return (
        one[:2] == other[:2]
        and one[2].keys() == other[2].keys()
        and all(torch.equal(tensor, other[2][name]) for name, tensor in one[2].items())
    )


def whole(found: State, *expected: State) -> bool:
    """Whether all tensors that two models have in common come from the same one of them."""
    return any(all(torch.equal(found[name], one[name]) for name in found.keys() & one.keys()) for one in expected)


SHARDS = {"max_shard_size": "40KB"}


def name(layout: Any) -> str:
    return "one file" if layout == {} else "-".join(map(str, layout.values())) if isinstance(layout, dict) else layout
