"""Saves that are killed, that meet a load, or that run at the same time leave a whole checkpoint."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BERT
from cut_saves import DISK, SHARDS, name, old_and_new, same, state, whole
from forked_programs import run_forked
from hub_server import environment
from transformers import AutoModelForMaskedLM

import hf_linattn
from hf_linattn.errors import CheckpointError

KILLED = """
import os, signal, sys
sys.path[:0] = ["tests", "tests/models"]
from test_cut_off_saves import *
from pathlib import Path

root = Path(sys.argv[1])
first, second = old_and_new()
first.save_pretrained(root / "template")
shutil.copytree(root / "template", root / "scratch")
total = operations(lambda: second.save_pretrained(root / "scratch"))
expected = state(root / "template"), state(root / "scratch")
seen = set()
for last in range(total):
    folder = root / f"cut{last}"
    shutil.copytree(root / "template", folder)
    child = os.fork()
    if child == 0:
        DISK.at = lambda number: os.kill(os.getpid(), signal.SIGKILL) if number > last else None
        DISK.count = 0
        second.save_pretrained(folder)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    found = state(folder)
    seen.add([same(found, one) for one in expected].index(True))
    second.save_pretrained(folder)
    assert not [name for name in os.listdir(folder) if name.startswith("_")]
assert seen == {0, 1}, seen
print("killed", total)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_every_operation(tmp_path: Path) -> None:
    assert "killed" in run_forked(["-c", KILLED, str(tmp_path)], environment()).stdout


@pytest.mark.parametrize("layout", [{}, SHARDS], ids=name)
@pytest.mark.parametrize("auto", [AutoModelForMaskedLM, hf_linattn.LinAttnBertForMaskedLM], ids=["auto", "class"])
def test_a_save_while_loading(auto: Any, layout: Any, tmp_path: Path) -> None:
    """The folder is saved anew at any time that a loader opens config.json: old, new, or an error that says so."""
    first, second = old_and_new()
    for settings in (second, hf_linattn.convert(BERT.build(), BERT.settings("favor_plus"))):
        with torch.no_grad():
            settings.bert.embeddings.word_embeddings.weight.add_(3)
        first.save_pretrained(tmp_path / "template", **layout)
        expected = [state(tmp_path / "template")]
        settings.save_pretrained(tmp_path / "new", **layout)
        expected.append(state(tmp_path / "new"))
        outcomes = []
        for place in range(1, 20):
            folder = tmp_path / "folder"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(tmp_path / "template", folder)
            seen = 0

            def on_read(path: str) -> None:
                nonlocal seen
                if path.startswith(str(folder)) and path.endswith("config.json"):  # noqa: B023
                    seen += 1
                    if seen == place:  # noqa: B023
                        DISK.on_read = None
                        settings.save_pretrained(folder, **layout)  # noqa: B023
                        DISK.on_read = on_read

            DISK.on_read = on_read
            try:
                found = state(folder, auto)
            except CheckpointError:
                outcomes.append("refused")
            else:
                outcomes.append("old" if same(found, expected[0]) else "new")
                assert same(found, expected[0]) or same(found, expected[1]), place
            finally:
                DISK.on_read = None
            if seen < place:
                break
        assert outcomes[-1] == "old"  # no save any more
        assert len(outcomes) > 3


def test_saves_at_the_same_time_wait_for_each_other(tmp_path: Path) -> None:
    first, second = old_and_new()
    errors: list[BaseException] = []

    def save(model: Any) -> None:
        try:
            for _ in range(4):
                model.save_pretrained(tmp_path)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(model,)) for model in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert not [name for name in os.listdir(tmp_path) if name.startswith("_")]
    loaded = type(first).from_pretrained(tmp_path).state_dict()
    assert whole(loaded, first.state_dict(), second.state_dict())
