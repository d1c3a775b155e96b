"""A save that is cut off at any of its file operations leaves the old checkpoint or the new one, whole."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BERT, GPT2
from hub_server import environment, run
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig, BertForMaskedLM

import hf_linattn
from hf_linattn.errors import CheckpointError
from hf_linattn.models.saving import pending_save, save_atomically

State = dict[str, torch.Tensor]
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.chmod", "shutil.copyfile"}


class Cut(BaseException):
    """Stands for a signal: not an Exception, so that no handler swallows it."""


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


def operations(save: Callable[[], None]) -> int:
    with DISK.calling(lambda number: None):
        save()
    return DISK.count


def cut_at(last: int) -> Callable[[int], None]:
    """No operation happens after the `last`: also none of cleaning up."""

    def at(number: int) -> None:
        if number > last:
            raise Cut(number)

    return at


def fails_at(place: int) -> Callable[[int], None]:
    """One operation finds the disk full."""

    def at(number: int) -> None:
        if number == place:
            raise OSError(28, "No space left on device")

    return at


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


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


SHARDS = {"max_shard_size": "40KB"}
LAYOUTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("converted", {}, {}),
    ("converted", SHARDS, {}),
    ("converted", {}, SHARDS),
    ("converted", SHARDS, {"max_shard_size": "60KB"}),
    ("converted", {"variant": "fp16", **SHARDS}, {"variant": "fp16"}),
    ("stock", {}, {}),
    ("stock", {}, SHARDS),
]


def name(layout: Any) -> str:
    return "one file" if layout == {} else "-".join(map(str, layout.values())) if isinstance(layout, dict) else layout


@pytest.mark.parametrize(("previous", "before", "after"), LAYOUTS, ids=name)
def test_cut_off_at_every_operation(previous: str, before: Any, after: Any, tmp_path: Path) -> None:
    first, second = old_and_new()
    old = BERT.build() if previous == "stock" else first
    variant = {"variant": after["variant"]} if "variant" in after else {}
    template, scratch = tmp_path / "template", tmp_path / "scratch"
    old.save_pretrained(template, **before)
    (template / "notes.txt").write_text("mine")
    shutil.copytree(template, scratch)
    total = operations(lambda: second.save_pretrained(scratch, **after))
    assert total > 8
    expected = state(template, **variant), state(scratch, **variant)
    assert not [entry for entry in os.listdir(scratch) if entry.startswith("_")]
    seen = []
    for last in range(total):
        folder = tmp_path / f"cut{last}"
        shutil.copytree(template, folder)
        with pytest.raises(Cut), DISK.calling(cut_at(last)):
            second.save_pretrained(folder, **after)
        found = state(folder, **variant)
        seen.append([same(found, one) for one in expected].index(True))
        # A stock class does not know of our saves: it must not mix them either.
        config = BertConfig.from_pretrained(folder, linear_attention=None)
        plain = BertForMaskedLM.from_pretrained(folder, config=config, **variant).state_dict()
        assert whole(plain, expected[seen[-1]][2]), last
        second.save_pretrained(folder, **after)  # tidies up
        assert contents(folder) == contents(scratch)
        shutil.rmtree(folder)
    assert seen == sorted(seen)
    assert set(seen) == {0, 1}


def test_cut_off_where_files_cannot_be_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    test_cut_off_at_every_operation("converted", {}, {}, tmp_path)


def test_what_a_cut_off_save_left_is_saved_elsewhere(tmp_path: Path) -> None:
    """The new config does not name the weights beside; one read by itself is saved without the name too."""
    first, second = old_and_new()
    second.save_pretrained(tmp_path / "x")
    for last in range(99):
        first.save_pretrained(tmp_path / "folder")
        with pytest.raises(Cut), DISK.calling(cut_at(last)):
            second.save_pretrained(tmp_path / "folder")
        if pending_save(tmp_path / "folder"):
            break
    config = AutoConfig.from_pretrained(tmp_path / "folder")
    assert config.transformers_weights.startswith("_incomplete_save_")
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "folder", config=config)
    assert same(state(tmp_path / "folder"), (type(model), model.config.linear_attention, model.state_dict()))
    model.save_pretrained(tmp_path / "elsewhere")
    config.save_pretrained(tmp_path / "elsewhere")
    assert same(state(tmp_path / "elsewhere"), state(tmp_path / "x"))


@pytest.mark.parametrize(("before", "after"), [({}, {}), (SHARDS, {}), ({}, SHARDS)], ids=name)
def test_full_disk_at_every_operation(before: Any, after: Any, tmp_path: Path) -> None:
    """An error says so, and leaves the old checkpoint as it was, or the new one."""
    first, second = old_and_new()
    template, scratch = tmp_path / "template", tmp_path / "scratch"
    first.save_pretrained(template, **before)
    shutil.copytree(template, scratch)
    total = operations(lambda: second.save_pretrained(scratch, **after))
    expected = state(template), state(scratch)
    seen = []
    for place in range(1, total + 1):
        folder = tmp_path / f"full{place}"
        shutil.copytree(template, folder)
        with contextlib.suppress(OSError), DISK.calling(fails_at(place)):
            second.save_pretrained(folder, **after)
        found = state(folder)
        seen.append([same(found, one) for one in expected].index(True))
        if seen[-1] == 0:
            assert contents(folder) == contents(template)
        second.save_pretrained(folder, **after)
        assert contents(folder) == contents(scratch)
        shutil.rmtree(folder)
    assert set(seen) == {0, 1}


def test_everything_of_a_checkpoint_belongs_together(tmp_path: Path) -> None:
    """Of a decoder, generation_config.json too; in a subfolder, from a folder that cannot be written to."""
    models = [hf_linattn.convert(GPT2.build(), GPT2.settings("favor_plus")) for _ in range(2)]
    for number, model in enumerate(models):
        model.generation_config.max_length = 30 + number
        with torch.no_grad():
            model.transformer.wte.weight.add_(number)
    models[0].save_pretrained(tmp_path / "template" / "sub")
    shutil.copytree(tmp_path / "template", tmp_path / "scratch")
    total = operations(lambda: models[1].save_pretrained(tmp_path / "scratch" / "sub"))
    seen = set()
    for last in range(total):
        folder = tmp_path / f"cut{last}"
        shutil.copytree(tmp_path / "template", folder)
        with pytest.raises(Cut), DISK.calling(cut_at(last)):
            models[1].save_pretrained(folder / "sub")
        content = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        model = AutoModelForCausalLM.from_pretrained(folder, subfolder="sub")
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == content
        number = model.generation_config.max_length - 30
        assert torch.equal(model.transformer.wte.weight, models[number].transformer.wte.weight)
        seen.add(number)
    assert seen == {0, 1}


@pytest.mark.parametrize(("ranks", "gone"), [((4, 4), 0), ((4, 8), 2)], ids=["same settings", "other settings"])
def test_adapters_are_never_mixed(ranks: tuple[int, int], gone: int, tmp_path: Path) -> None:
    """Other settings: for two operations there is none rather than one of the old and the new. The base stays."""
    names = ["adapter_config.json", "adapter_model.safetensors"]

    def save(folder: Path, number: int) -> None:
        def write(staging: Path) -> None:
            (staging / names[0]).write_text(f"rank {ranks[number]}")
            (staging / names[1]).write_text(f"weights {number}")

        save_atomically(write, folder, {}, writes=True)

    old_and_new()[0].save_pretrained(tmp_path / "template")
    save(tmp_path / "template", 0)
    shutil.copytree(tmp_path / "template", tmp_path / "scratch")
    total = operations(lambda: save(tmp_path / "scratch", 1))
    assert sorted(os.listdir(tmp_path / "scratch")) == sorted([*names, "config.json", "model.safetensors"])
    seen = []
    for last in range(total):
        folder = tmp_path / f"cut{last}"
        shutil.copytree(tmp_path / "template", folder)
        with pytest.raises(Cut), DISK.calling(cut_at(last)):
            save(folder, 1)
        found = [(folder / name).read_text() if (folder / name).exists() else None for name in names]
        whole_ones = [[f"rank {ranks[number]}", f"weights {number}"] for number in (0, 1)]
        seen.append(whole_ones.index(found) if found in whole_ones else None)
        assert found in whole_ones or found[1] is None
        assert (folder / "model.safetensors").exists()
        save(folder, 1)
        assert [(folder / name).read_text() for name in names] == whole_ones[1]
    assert seen.count(None) == gone
    assert {0, 1} <= set(seen)


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
    assert "killed" in run(["-c", KILLED, str(tmp_path)], environment()).stdout


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
