"""`hf-linattn eval`: what it asks of a suite and tells; the suites themselves, where they are installed."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from shell import mistake, shell, told
from transformers import AutoTokenizer

from hf_linattn.cli import eval as command
from hf_linattn.cli.suites import Evaluation, Found, Source

MISSING = {"lm_eval": "lm-eval", "mteb": "mteb"}
TASK = """task: recall
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.mark.parametrize(("model", "suite"), [("favor", "lm-eval"), ("bert-mlm", "mteb"), ("bert", "mteb")])
def test_what_a_suite_is_asked_and_what_is_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, suite: str
) -> None:
    asked: list[Evaluation] = []
    scores = {"favor_plus": {"one": {"acc": 0.5}, "two": {"acc": 0.25}}, "softmax": {"one": {"acc": 1.0}}}
    scores["softmax"]["two"] = {"acc": 0.75}
    monkeypatch.setitem(command.SUITES, suite, lambda evaluation: asked.append(evaluation) or Found(scores, {}))
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.0")
    output = tmp_path / "scores.json"
    flags = ["--tasks", "one,two", "--limit", "3", "--baseline", "--output", output]
    found = told("eval", folder / model, *flags)
    assert asked[0].tasks == ("one", "two")
    assert (asked[0].limit, asked[0].baseline, asked[0].model) == (3, True, str(folder / model))
    assert (found["suite"], found["scores"]) == (suite, scores)
    assert json.loads(output.read_text()) == found
    assert "│ two  │ acc    │ 0.2500     │ 0.7500  │" in shell("eval", folder / model, *flags).stdout


def test_results_for_the_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`.eval_results` and `model-index`; a second run replaces its own and leaves the others."""
    shutil.copytree(folder / "favor", checkpoint := tmp_path / "favor")
    scores = {
        "one": {"acc": 0.5, "acc_stderr": 0.125, "gone": math.nan},
        "two": {"em,strict": 0.25},
        "file": {"a": 1.0},
    }
    scores["two"]["em_stderr,strict"] = 0.0625
    sources = {
        "one": Source("text-generation", "me/one", "a config", "test"),
        "two": Source("text-generation", "me/two", revision="12ab"),
    }
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.0")

    def run(limit: int) -> tuple[dict[str, Any], set[tuple[Any, ...]], str]:
        found = Found({"favor_plus": scores, "softmax": {"one": {"acc": 1.0}}}, sources)
        monkeypatch.setitem(command.SUITES, "lm-eval", lambda evaluation: found)
        flags = ["--tasks", "one,two,file", "--limit", str(limit), "--eval-results", "--json"]
        told = shell("eval", checkpoint, *flags).stderr
        files = {path.stem: path.read_text() for path in (checkpoint / ".eval_results").iterdir()}
        entries = {name: parse_eval_result_entries(yaml.safe_load(text)) for name, text in files.items()}
        card = ModelCard.load(checkpoint / "README.md")
        assert card.data.pipeline_tag == "text-generation"  # the rest of the card stays
        index = {
            (one.dataset_type, one.dataset_config, one.dataset_split, one.dataset_revision, one.metric_name, value)
            for one in card.data.eval_results
            for value in [one.metric_value]
        }
        assert len(index) == len(card.data.eval_results)
        return entries, index, told

    entries, index, told = run(3)
    assert "'file' has no data set on the Hub" in told
    assert index == {
        ("me/one", "a config", "test", None, "acc (one)", 0.5),
        ("me/two", None, None, "12ab", "em,strict (two)", 0.25),
    }
    [one], [two] = entries.pop("one"), entries.pop("two")
    assert not entries
    assert (one.dataset_id, one.task_id, one.value) == ("me/one", "a config", 0.5)
    assert one.notes == "acc; standard error 0.125; favor_plus attention, first 3 examples"
    assert (two.dataset_id, two.task_id, two.value, two.dataset_revision) == ("me/two", "default", 0.25, "12ab")
    assert "standard error 0.0625" in two.notes

    scores = {"one": {"acc": 0.75}}
    entries, index, _ = run(8)
    assert (entries["one"][0].value, entries["two"][0].value) == (0.75, 0.25)
    assert {(name, value) for *_, name, value in index} == {("acc (one)", 0.75), ("em,strict (two)", 0.25)}


def test_a_card_that_takes_no_results(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(command.SUITES, "lm-eval", lambda evaluation: pytest.fail("was evaluated"))
    shutil.copytree(folder / "favor", checkpoint := tmp_path / "favor")
    for header, words in (("model-index: [1]", "is none of the Hub's"), ("a: [", "is not valid YAML")):
        (checkpoint / "README.md").write_text(f"---\n{header}\n---\n")
        assert words in mistake("eval", checkpoint, "--tasks", "one", "--eval-results")
    assert not (checkpoint / ".eval_results").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tasks", ","], "--tasks must name at least one task"),
        (["--tasks", "one", "--suite", "lm_eval"], "--suite must be one of ['lm-eval', 'mteb']; got 'lm_eval'"),
        (["--tasks", "one", "--output", "{nowhere}/a.json"], "cannot be written: its folder is not there"),
        ([], "Missing option '--tasks'"),
    ],
)
def test_mistakes_in_what_is_asked(folder: Path, tmp_path: Path, flags: list[str], words: str) -> None:
    assert words in mistake("eval", folder / "favor", *(flag.format(nowhere=tmp_path / "none") for flag in flags))


@pytest.mark.parametrize(("module", "model"), [("lm_eval", "favor"), ("mteb", "bert")])
def test_a_suite_that_is_not_installed(folder: Path, monkeypatch: pytest.MonkeyPatch, module: str, model: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == module else find(name, *more))
    line = mistake("eval", folder / model, "--tasks", "one")
    assert f"needs {MISSING[module]}, which is not installed: pip install {MISSING[module]}" in line


def test_a_task_of_lm_eval_in_a_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    rows = [{"text": "w1 w2 w3", "choices": ["w4", "w5"], "label": number % 2} for number in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = tmp_path / "recall.yaml"
    task.write_text(TASK.replace("ROWS", str(tmp_path / "rows.jsonl")))
    assert "has none. Set its eos_token" in mistake("eval", folder / "favor", "--tasks", task)
    tokenizer = AutoTokenizer.from_pretrained(folder / "gpt2", eos_token="[SEP]")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    flags = ["--tokenizer", tmp_path / "tokenizer", "--limit", "4", "--baseline"]
    scores = told("eval", folder / "favor", "--tasks", task, *flags)["scores"]
    assert list(scores) == ["favor_plus", "softmax"]
    assert 0 <= scores["favor_plus"]["recall"]["acc"] <= 1
    assert "Did you mean 'lambada_openai'?" in mistake("eval", folder / "favor", "--tasks", "lambada_opena")


def test_pairs_for_mteb_in_a_file(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("mteb")
    draw = random.Random(0)
    rows = [
        {"sentence1": f"w{a} w{b} w{a} w{b}", "sentence2": f"w{b} w{c} w{b} w{c}", "score": draw.random()}
        for a, b, c in ([draw.randrange(50) for _ in range(3)] for _ in range(20))
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shell("convert", folder / "bert", tmp_path / "eva", "--kind", "eva", "--set", "window_size=2")
    scores = told("eval", tmp_path / "eva", "--tasks", tmp_path / "pairs.jsonl", "--baseline")["scores"]
    assert -1 <= scores["eva"]["pairs"]["cosine_spearman"] <= 1
    assert list(scores) == ["eva", "softmax"]
    assert "Did you mean: 'STSBenchmark'?" in mistake("eval", tmp_path / "eva", "--tasks", "STSBenchmrk")
    assert "--limit is for lm-eval" in mistake("eval", tmp_path / "eva", "--tasks", "STSBenchmark", "--limit", "2")
