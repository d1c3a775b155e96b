"""A save that is cut off at any of its file operations leaves the old checkpoint or the new one, whole."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BERT, GPT2
from cut_saves import DISK, SHARDS, name, old_and_new, same, state, whole
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig, BertForMaskedLM

import hf_linattn
from hf_linattn.models.saving import pending_save, save_atomically


class Cut(BaseException):
    """Stands for a signal: not an Exception, so that no handler swallows it."""


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


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


LAYOUTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("converted", {}, {}),
    ("converted", SHARDS, {}),
    ("converted", {}, SHARDS),
    ("converted", SHARDS, {"max_shard_size": "60KB"}),
    ("converted", {"variant": "fp16", **SHARDS}, {"variant": "fp16"}),
    ("stock", {}, {}),
    ("stock", {}, SHARDS),
]


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
