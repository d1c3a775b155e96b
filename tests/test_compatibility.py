"""The selection of tests for other releases of Transformers, the file a run of it writes, and the table of those."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cases import KINDS
from compatibility import TOPICS, topics_of

from hf_linattn.integrations.expected import TESTED_RELEASES
from scripts import compatibility_table as table

ROOT = Path(__file__).resolve().parents[1]
pytest_plugins = ["pytester"]

PROJECT = {"requires-python": ">=3.10", "dependencies": ["torch>=2.6,<3", "transformers>=5.10,<6", "jinja2>=3.1"]}


def test_selection_covers_every_topic_kind_and_family(request: pytest.FixtureRequest) -> None:
    marked = {path for path in (ROOT / "tests").rglob("test_*.py") if "\n@pytest.mark.compat(" in path.read_text()}
    items = request.session.items
    if not marked <= {item.path for item in items}:
        pytest.skip("looks at all tests: make test")
    selection = [(item.nodeid, topics_of(item), item.path) for item in items if item.get_closest_marker("compat")]
    for topic in TOPICS:
        tests = [test for test, topics, _ in selection if topic in topics]
        assert tests, topic
        # Loops over kinds and models inside a test do not show in its name.
        if topic not in ("train", "resume"):
            assert all(any(kind in test for test in tests) for kind in KINDS), topic
        if topic in ("convert", "native", "save and load", "compare"):
            assert all(any(family in test for test in tests) for family in ("bert", "gpt2", "vit")), topic
    # The environments of noxfile.py collect these files and no other.
    assert {path for _, _, path in selection} == marked


TESTS = """
import pytest
from pytest import mark

@mark.compat("cache", "beams")
def test_a_good_release(): ...

@mark.compat("cache")
def test_a_bad_release(): assert False

@pytest.fixture
def broken(): raise ValueError

@mark.compat("static")
def test_of_a_broken_fixture(broken): ...

@mark.compat("compare")
def test_a_skipped_topic(): pytest.skip("no")

def test_without_a_topic(): ...
"""


CONFTEST = """
import compatibility

def pytest_addoption(parser):
    compatibility.add_option(parser)

def pytest_configure(config):
    compatibility.configure(config)

def pytest_collection_modifyitems(items):
    compatibility.mark_topics(items)
"""


def small_suite(pytester: pytest.Pytester, tests: str, *arguments: str) -> tuple[int, str, Path]:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(compatibility=(ROOT / "tests" / "compatibility.py").read_text(), test_some=tests)
    pytester.makeini("[pytest]\nmarkers =\n    compat(*topics): x\npythonpath = .\n")
    done = pytester.runpytest_inprocess("-q", "--compat-json", "out/run.json", *arguments)
    return int(done.ret), done.stdout.str() + done.stderr.str(), pytester.path / "out" / "run.json"


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["one-process", "workers"])
def test_file_of_a_run(workers: list[str], pytester: pytest.Pytester) -> None:
    code, output, path = small_suite(pytester, TESTS, *workers)
    assert code == 1, output
    run = json.loads(path.read_text())
    assert run["exit"] == 1
    assert run["tests"] == 4
    assert run["topics"]["cache"] == {"passed": 1, "failed": 1, "skipped": 0}
    assert run["topics"]["beams"] == {"passed": 1, "failed": 0, "skipped": 0}
    assert run["topics"]["static"] == {"passed": 0, "failed": 1, "skipped": 0}
    assert run["topics"]["compare"] == {"passed": 0, "failed": 0, "skipped": 1}
    assert run["failures"] == ["test_some.py::test_a_bad_release", "test_some.py::test_of_a_broken_fixture"]
    assert run["versions"]["transformers"]


def test_a_file_that_cannot_be_imported_is_a_failure(pytester: pytest.Pytester) -> None:
    code, output, path = small_suite(pytester, "import no_such_package\n")
    assert code == 2, output
    run = json.loads(path.read_text())
    assert run["exit"] == 2
    assert run["failures"] == ["test_some.py (not collected)"]


def test_unknown_topic(pytester: pytest.Pytester) -> None:
    code, output, _ = small_suite(pytester, TESTS.replace("beams", "beems"))
    assert code != 0
    assert "compat takes topics out of" in output
    assert "beems" in output


# -- the table ------------------------------------------------------------------------------------------------------
def run_of(transformers: str = "5.14.1", python: str = "3.11.7", **changes: Any) -> dict[str, Any]:
    return {
        "format": 1,
        "versions": {"transformers": transformers, "torch": "2.13.0+cpu", "huggingface_hub": "2.4.0"},
        "python": python,
        "system": "Linux x86_64",
        "gpu": None,
        "date": "2026-01-02",
        "seconds": 61.4,
        "exit": 0,
        "tests": 3,
        "topics": {"convert": {"passed": 2, "failed": 0, "skipped": 1}, "beams": {"passed": 1, "failed": 0}},
        "failures": [],
        **changes,
    }


def write(folder: Path, **runs: dict[str, Any]) -> list[str]:
    """Files of runs and a page; the arguments that make its table."""
    results, page = folder / "results", folder / "page.md"
    results.mkdir()
    for name, run in runs.items():
        (results / f"transformers-{name.replace('_', '.')}-python-3.11.json").write_text(json.dumps(run))
    page.write_text(f"before\n{table.BEGIN}\n{table.END}\nafter\n")
    return ["--results", str(results), "--page", str(page)]


def test_green_table(tmp_path: Path) -> None:
    arguments = write(tmp_path, **{"5_9": run_of("5.9.2"), "5_14": run_of(), "newest": run_of("5.30.0")})
    assert table.main(arguments) == 0
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("before\n")
    assert page.endswith("\nafter\n")
    row = "| 5.14.1 | 2.13.0+cpu | 2.4.0 | 3.11.7 | Linux x86_64, no GPU | 2026-01-02 | 61 s | passes |"
    assert row in page
    assert "| 5.14.1 | 2.13.0+cpu | 2, 1 skipped | 1 |" in page
    assert page.index("| 5.9.2 |") < page.index("| 5.14.1 |") < page.index("| newest: 5.30.0 |")
    assert table.main([*arguments, "--check"]) == 0
    (tmp_path / "page.md").write_text(page.replace("passes", "passes well", 1))
    assert table.main([*arguments, "--check"]) == 1


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        (
            {"topics": {"convert": {"passed": 2, "failed": 3}, "beams": {"passed": 1, "failed": 0}}, "exit": 1}
            | {"failures": ["tests/test_a.py::test_b"]},
            ["**fails: convert**", "| **3 of 5 fail** | 1 |", "Failed on 5.14.1: `tests/test_a.py::test_b`"],
        ),
        (
            {"topics": {"convert": {"passed": 2, "failed": 0}, "beams": {"passed": 0, "failed": 0}}},
            ["**fails: beams**", "| 2 | **none** |"],
        ),
        ({"exit": 3}, ["**fails: pytest ended with 3**"]),
    ],
    ids=["failed", "nothing-ran", "crashed"],
)
def test_red_rows(changes: dict[str, Any], shown: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert table.main(write(tmp_path, **{"5_14": run_of(**changes), "5_15": run_of("5.15.0")})) == 1
    page = (tmp_path / "page.md").read_text()
    assert all(text in page for text in shown), page
    assert page.count("| passes |") == 1
    assert "5.14.1: **fails" in capsys.readouterr().err


def test_release_that_cannot_be_installed(tmp_path: Path) -> None:
    error = {
        "format": 1,
        "error": "transformers==5.15.* could not be installed",
        "python": "3.11.7",
        "date": "2026-01-02",
    }
    arguments = write(tmp_path, **{"5_14": run_of(), "5_15": error, "newest": {**error, "error": "no start"}})
    assert table.main(arguments) == 1
    page = (tmp_path / "page.md").read_text()
    row = "| 5.15 |  |  | 3.11.7 |  | 2026-01-02 |  | **transformers==5.15.* could not be installed** |"
    assert row in page
    assert page.index("| 5.14.1 |") < page.index("| 5.15 |") < page.index("| newest: none |")


def test_bounds_that_nobody_has_run() -> None:
    runs = [
        {"name": "a", **run_of("5.10.4", python="3.10.2")},
        {"name": "b", **run_of("5.14.1")},
        {"name": "c", **run_of("5.9.0", exit=1)},  # failed: no evidence
    ]
    lines = table.bounds_table(runs, PROJECT)[2:]
    assert lines == [
        "| Python | `>=3.10` | 3.10.2, 3.11.7 | above 3.11.7 |",
        "| torch | `>=2.6,<3` | 2.13.0 | below 2.13.0, above 2.13.0 |",
        "| transformers | `>=5.10,<6` | 5.10.4, 5.14.1 | above 5.14.1 |",
    ]


def test_page_is_what_the_results_say() -> None:
    assert table.main(["--check"]) == 0, (
        "run scripts/compatibility_table.py; a release that fails has to be dealt with"
    )
    page = (ROOT / "docs" / "compatibility.md").read_text()
    assert all(f"\n| {topic} | " in page for topic in TOPICS)
    releases = [table.release(run) for run in table.load(table.RESULTS)]
    assert (str(min(releases)), str(max(releases))) == TESTED_RELEASES, "the releases that the error messages name"
