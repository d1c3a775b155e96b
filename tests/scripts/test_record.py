"""A run in parts and its file; repositories that are deleted whatever happens."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_server import ROOT

sys.path.append(str(ROOT / "scripts"))

from hub_parts.record import Record, Refused  # noqa: E402
from hub_parts.repositories import Repositories  # noqa: E402


def record(folder: Path, **options: Any) -> Record:
    columns = {"load": "loaded", "first": "one", "second": "two", "third": "three"}
    return Record(folder / "new" / "r.json", title="Title", facts={"fact": 1}, columns=columns, **options)


def read(made: Record) -> dict[str, Any]:
    return json.loads(made.path.read_text())


def broken() -> None:
    raise ValueError("first | line\nsecond line")


def refuse() -> None:
    raise Refused("not possible here")


def test_parts_are_isolated_and_dependent_ones_skipped(tmp_path: Path) -> None:
    told = []
    made = record(tmp_path, on_part=lambda part: told.append((part.name, part.status)))
    assert made.run("m/load", lambda: {"shown": "yes", "more": [1]})
    assert not made.run("m/a/first", broken, needs=["m/load"])
    assert not made.run("m/a/second", lambda: None, needs=["m/a/first"])
    assert not made.run("m/a/third", lambda: None, needs=["m/a/second"])
    assert not made.run("m/b/first", refuse)
    assert made.run("m/b/second", lambda: None)
    made.finish()

    found = read(made)
    assert found["fact"] == 1
    assert found["complete"]
    assert found["counts"] == {"ok": 2, "failed": 1, "skipped": 2, "refused": 1}
    assert told == [(part["part"], part["status"]) for part in found["parts"]]
    failed = found["parts"][1]
    assert failed["error"] == "ValueError: first | line"
    assert failed["traceback"][-2:] == ["ValueError: first | line", "second line"]
    assert [part.name for part in made.failed] == ["m/a/first"]
    table = made.markdown("Introduction.")
    assert "# Title\n\nIntroduction.\n\n|  | loaded | seconds |\n" in table
    assert "| m/a | **failed** | skipped: needs first | skipped: needs second |" in table
    assert "| m/b | refused, as documented | ok |  |" in table
    assert "- `m/a/first`: **failed**. ValueError: first \\| line\n" in table


def test_results_are_written_as_they_come(tmp_path: Path) -> None:
    made = record(tmp_path)

    def look() -> None:
        seen = read(made)
        assert not seen["complete"]
        assert [(part["part"], part["status"]) for part in seen["parts"]] == [
            ("a/first", "ok"),
            ("a/second", "running"),
        ]

    made.run("a/first", lambda: None)
    assert made.run("a/second", look), made.parts["a/second"].traceback
    assert "cut short" in made.markdown()
    assert [path.name for path in made.path.parent.iterdir()] == ["r.json"]


def test_made_to_fail_after_the_work(tmp_path: Path) -> None:
    done = []
    made = record(tmp_path, fail=["a/first"])

    assert not made.run("a/first", lambda: done.append(1))
    assert done == [1]
    (part,) = read(made)["parts"]
    assert part["status"] == "failed"
    assert part["on_purpose"]
    assert read(made)["made_to_fail"] == ["a/first"]


def test_an_interruption_comes_out(tmp_path: Path) -> None:
    made = record(tmp_path)

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made.run("a/first", interrupted)
    assert read(made)["parts"][0]["status"] == "interrupted"
    assert [part.name for part in made.failed] == ["a/first"]


class FakeApi:
    """Some repositories, of which `stuck` cannot be deleted and `slow` not the first time."""

    def __init__(self, *names: str) -> None:
        self.names = set(names)
        self.asked: list[str] = []

    def repo_exists(self, name: str) -> bool:
        return name in self.names

    def delete_repo(self, name: str, missing_ok: bool) -> None:
        assert missing_ok
        self.asked.append(name)
        if "stuck" in name or ("slow" in name and self.asked.count(name) == 1):
            raise ConnectionError("no answer\nat all")
        self.names.discard(name)


def test_only_own_repositories_are_deleted() -> None:
    changes = []
    api = FakeApi("me/other")
    repositories = Repositories(api, "me", "abc", lambda: changes.append(1))
    name = repositories.name("bert", "eva")
    assert name == "me/hf-linattn-check-abc-bert-eva"

    with pytest.raises(ValueError, match="not made by this run"):
        repositories.delete("me/other")
    with pytest.raises(RuntimeError, match="exists already"):
        repositories.claim("me/other")
    assert repositories.delete_all() == {}
    assert api.asked == []

    repositories.claim(name)
    api.names.add(name)
    assert repositories.left == [name]
    repositories.delete(name)
    assert api.names == {"me/other"}
    assert repositories.to_dict() == {"made": [name], "deleted": [name], "left": []}
    assert len(changes) == 2


def test_what_cannot_be_deleted_is_listed_and_the_rest_deleted() -> None:
    api = FakeApi()
    repositories = Repositories(api, "me", "abc")
    for name in ("me/stuck", "me/slow", "me/quick", "me/never-made"):
        repositories.claim(name)
    api.names |= {"me/stuck", "me/slow", "me/quick"}

    assert repositories.delete_all(wait=0) == {"me/stuck": "ConnectionError: no answer"}
    assert api.names == {"me/stuck"}
    assert repositories.left == ["me/stuck"]


def test_a_deletion_that_did_nothing_is_seen() -> None:
    api = FakeApi()
    repositories = Repositories(api, "me", "abc")
    repositories.claim("me/a")
    api.names.add("me/a")
    api.delete_repo = lambda name, missing_ok: None  # type: ignore[method-assign]

    with pytest.raises(RuntimeError, match="still there"):
        repositories.delete("me/a")
    assert repositories.left == ["me/a"]
