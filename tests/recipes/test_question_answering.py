"""The question answering recipe on tiny models: rows, answers, scores, how it goes on; and the data it is for."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from recipe_runs import assert_mistake, assert_same_weights, pushed, train, two_processes
from tiny_checkpoints import WORDS, build
from transfer_recipe import arguments as transfer_arguments
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

import evaluate_checkpoint
import question_answering
from parts.questions import Encoder, QuestionArguments, QuestionColumns

RECIPE = "recipes/question_answering.py"
ROWS = 24
COLUMNS = QuestionColumns("context", "question", "answers")


def question(number: int, words: int) -> dict[str, Any]:
    """A row: two words of a context, and what stands behind them."""
    draw = random.Random(number)
    parts = draw.sample(WORDS[4:-1], 10) + draw.choices(WORDS[4:-1], k=words - 10)
    draw.shuffle(parts)
    place = draw.randrange(words - 4)
    answer = " ".join(parts[place + 2 : place + 4])
    start = len(" ".join(parts[: place + 2])) + 1
    asked = " ".join(parts[place : place + 2])
    return {
        "id": str(number),
        "context": " ".join(parts),
        "question": asked,
        "answers": {"text": [answer], "answer_start": [start]},
    }


def nested(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as SQuAD is distributed: articles of paragraphs of questions."""
    paragraphs = [
        {
            "context": row["context"],
            "qas": [
                {
                    "id": row["id"],
                    "question": row["question"],
                    "answers": [
                        {"text": text, "answer_start": start}
                        for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
                    ],
                    "is_impossible": not row["answers"]["text"],
                }
            ],
        }
        for row in rows
    ]
    return [{"title": "one", "paragraphs": paragraphs[:5]}, {"title": "two", "paragraphs": paragraphs[5:]}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and questions on contexts of up to 80 words, for positions 64: `qa.jsonl`, `qa.parquet`, nested ones."""
    path = tmp_path_factory.mktemp("question_answering")
    build(path)
    rows = [question(i, words=20 + 60 * i // ROWS) for i in range(ROWS)]
    (path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), path / "qa.parquet")
    (path / "nested.json").write_text(json.dumps({"version": "1.1", "data": nested(rows)}, indent=1))
    (path / "nested.jsonl").write_text("".join(json.dumps(article) + "\n" for article in nested(rows)))
    for row in rows[::3]:
        row["answers"] = {"text": [], "answer_start": []}
    (path / "v2.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(folder: Path, output: Path, family: str = "bert", kind: str = "favor_plus", *changes: str) -> list[str]:
    """The command line of six steps, on rows that share eight tokens."""
    argv = transfer_arguments(folder, output, family, kind, "--learning_rate", "1e-2", "--max_eval_samples", "24")
    if kind in ("softmax", "keep"):
        del argv[argv.index("--attention_config") : argv.index("--attention_config") + 2]
    argv[argv.index("--train_file") + 1] = str(folder / "qa.jsonl")
    argv[argv.index("--max_length") + 1] = "40"
    argv += ["--validation_file", str(folder / "qa.jsonl")]
    return [*argv, *([] if "--no_stride" in changes else ["--doc_stride", "8"]), *changes]


def run(argv: list[str]) -> dict[str, Any]:
    return question_answering.main(argv, quiet=True)


def metrics_of(argv: list[str]) -> dict[str, Any]:
    """Of a run that trains nothing."""
    return run([*argv, "--learning_rate", "0", "--max_steps", "1"])["metrics"]["eval"]


# -- rows of the model ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("no_stride", [False, True])
def test_rows_say_where_the_answer_is(folder: Path, family: str, no_stride: bool) -> None:
    """Every answer is whole in some row, at the tokens that spell it; a row without it points at its first token."""
    tokenizer = AutoTokenizer.from_pretrained(folder / family)
    args = QuestionArguments(no_stride=True) if no_stride else QuestionArguments(doc_stride=8)
    rows = [question(i, words=20 + 60 * i // ROWS) for i in range(ROWS)]
    encode = Encoder(tokenizer, COLUMNS, args, 100 if no_stride else 30, "validation", keeps_places=True)
    found = encode({name: [row[name] for row in rows] for name in rows[0]}, range(ROWS))
    assert max(found["length"]) <= (100 if no_stride else 30)
    assert (len(found["length"]) == ROWS) == no_stride
    answered = set()
    for ids, start, end, null, example, offsets in zip(
        *(found[name] for name in ("input_ids", "start_positions", "end_positions", "null", "example", "offsets")),
        strict=True,
    ):
        context = rows[example]["context"]
        assert null == 0
        inside = [i for i, (first, last) in enumerate(offsets) if last > first]
        assert all(context[slice(*offsets[i])] == tokenizer.decode([ids[i]]).strip() for i in inside)
        if start == end == null:
            continue
        assert context[offsets[start][0] : offsets[end][1]] == rows[example]["answers"]["text"][0]
        answered.add(example)
    assert answered == set(range(ROWS))


def test_an_answer_that_is_cut_is_none(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "bert")
    row = {"context": "w1 w2 w3 w4 w5 w6 w7 w8 w9", "question": "w0"}
    row["answers"] = {"text": ["w4 w5"], "answer_start": [9]}
    encode = Encoder(tokenizer, COLUMNS, QuestionArguments(doc_stride=1), 8, "train", keeps_places=False)
    found = encode({name: [value] for name, value in row.items()}, [0])
    spans = list(zip(found["start_positions"], found["end_positions"], strict=True))
    # Rows of four words that share one: w1..w4, w4..w7, w7..w9.
    assert spans == [(0, 0), (3, 4), (0, 0)]


# -- runs -------------------------------------------------------------------------------------------------------------
def test_perfect_scores_give_the_true_answers(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From data through rows, in whatever order they are predicted, to the metric."""
    seen: dict[str, Any] = {}
    original = question_answering.best_answers

    def perfect(examples: Any, rows: Any, logits: Any, args: Any) -> list[str]:
        data = seen["task"].data["validation"]
        found = []
        for name in ("start_positions", "end_positions"):
            scores = np.full(logits[0].shape, -5.0)
            for i, (place, null) in enumerate(zip(data[name], rows["null"], strict=True)):
                scores[i, place] = 1.0 if place == null else 9.0
            found.append(scores)
        return original(examples, rows, tuple(found), args)

    prepare = question_answering.prepare

    def prepared(flags: Any) -> Any:
        seen["task"] = prepare(flags)
        return seen["task"]

    monkeypatch.setattr(question_answering, "best_answers", perfect)
    monkeypatch.setattr(question_answering, "prepare", prepared)
    found = metrics_of(arguments(folder, tmp_path))
    assert (found["eval_exact_match"], found["eval_f1"]) == (1.0, 1.0)


def test_predictions_are_in_the_order_of_the_rows(folder: Path, tmp_path: Path) -> None:
    """Rows of similar length share a batch in training; in evaluation that must not mix up questions."""
    run(arguments(folder, tmp_path / "out", "bert", "softmax"))
    common = ["--model_name_or_path", str(tmp_path / "out"), "--do_predict", "--test_file", str(folder / "qa.jsonl")]
    answers = []
    for batch in ("1", "7"):
        argv = arguments(folder, tmp_path / batch, "bert", "keep", *common, "--per_device_eval_batch_size", batch)
        argv.remove("--do_train")
        found = run(argv)["metrics"]
        assert found["test"]["test_f1"] == pytest.approx(found["eval"]["eval_f1"])
        lines = (tmp_path / batch / "predictions.tsv").read_text().splitlines()
        answers.append([line.split("\t")[1] for line in lines[1:]])
    contexts = [json.loads(line)["context"] for line in (folder / "qa.jsonl").read_text().splitlines()]
    assert answers[0] == answers[1]
    assert all(answer in context for answer, context in zip(answers[0], contexts, strict=True))


@pytest.mark.parametrize("data", ["qa.parquet", "nested.json", "nested.jsonl"])
def test_formats(folder: Path, tmp_path: Path, data: str) -> None:
    argv = arguments(folder, tmp_path / "a", "bert", "softmax")
    one = metrics_of(argv)
    two = metrics_of([*argv, "--validation_file", str(folder / data), "--train_file", str(folder / data)])
    assert two["eval_f1"] == one["eval_f1"]
    assert two["eval_loss"] == pytest.approx(one["eval_loss"])


def test_whole_contexts(folder: Path, tmp_path: Path) -> None:
    flags = ["--no_stride", "--extend_positions", "96", "--max_length", "96", "--transfer_steps", "2"]
    found = run(arguments(folder, tmp_path, "bert", "eva", *flags))
    assert found["data"]["max_length"] == 96
    assert found["attention"]["learned"] is True
    assert AutoModelForQuestionAnswering.from_pretrained(tmp_path).config.max_position_embeddings == 96
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == 96


def test_questions_without_answers(folder: Path, tmp_path: Path) -> None:
    data = str(folder / "v2.jsonl")
    argv = arguments(folder, tmp_path, "bert", "softmax", "--train_file", data, "--validation_file", data)
    found = metrics_of([*argv, "--version_2_with_negative", "--null_score_diff_threshold", "-1000"])
    assert found["eval_no_answer_f1"] == 1.0
    assert found["eval_has_answer_f1"] == 0.0
    assert found["eval_f1"] == pytest.approx(1 / 3)


def test_streams_and_decoders(folder: Path, tmp_path: Path) -> None:
    found = run(arguments(folder, tmp_path, "gpt2", "favor_plus", "--streaming", "--max_steps", "3"))
    assert found["log"][-1]["step"] == 3
    assert 0 <= found["metrics"]["eval"]["eval_f1"] <= 1


@pytest.mark.parametrize(
    "changes", [["--transfer_steps", "2", "--lora_target_modules", "query,value"], []], ids=["transfer and LoRA", ""]
)
def test_a_run_that_was_cut_ends_with_the_same_weights(folder: Path, tmp_path: Path, changes: list[str]) -> None:
    main = question_answering.main
    train(arguments(folder, tmp_path / "whole", "bert", "lara", *changes), main=main)
    train(arguments(folder, tmp_path / "cut", "bert", "lara", *changes), cut_after=3, main=main)
    train(arguments(folder, tmp_path / "cut", "bert", "lara", *changes), main=main)
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")


def test_two_processes_have_the_metric_of_one(folder: Path, tmp_path: Path) -> None:
    run(arguments(folder, tmp_path / "out", "bert", "eva"))
    found = {}
    for name in ("one", "two"):
        changes = ["--model_name_or_path", str(tmp_path / "out"), "--per_device_eval_batch_size", "5"]
        argv = arguments(folder, tmp_path / name, "bert", "keep", *changes)
        argv.remove("--do_train")
        if name == "one":
            run(argv)
        else:
            two_processes(RECIPE, argv, folder / "home")
        found[name] = json.loads((tmp_path / name / "results.json").read_text())
    assert [found[name]["processes"] for name in ("one", "two")] == [1, 2]
    one, two = (found[name]["metrics"]["eval"] for name in ("one", "two"))
    assert (one["eval_exact_match"], one["eval_f1"]) == (two["eval_exact_match"], two["eval_f1"])
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-6)  # 24 rows: the last batches repeat some


@pytest.mark.hub
def test_push_and_load_back(folder: Path, tmp_path: Path) -> None:
    code = (
        "import hf_linattn; from transformers import AutoModelForQuestionAnswering, AutoTokenizer\n"
        "model = AutoModelForQuestionAnswering.from_pretrained('local/it')\n"
        "assert model.config.linear_attention['kind'] == 'eva', model.config\n"
        "AutoTokenizer.from_pretrained('local/it')\n"
    )
    argv = arguments(folder, tmp_path / "out", "bert", "eva", "--max_steps", "1")
    files, card = pushed(RECIPE, argv, folder / "home", code)
    assert files == {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert "| exact_match |" in card


def test_evaluate_checkpoint(folder: Path, tmp_path: Path) -> None:
    trained = run(arguments(folder, tmp_path / "out", "bert", "lara", "--max_steps", "1"))
    argv = ["--model_name_or_path", str(tmp_path / "out"), "--validation_file", str(folder / "qa.jsonl")]
    argv += ["--max_length", "40", "--doc_stride", "8", "--repeats", "1", "--timed_batches", "1"]
    found = evaluate_checkpoint.main(argv)
    assert found["checkpoint"]["f1"] == pytest.approx(trained["metrics"]["eval"]["eval_f1"])
    assert found["original"]["attention"] == "softmax"


# -- mistakes ---------------------------------------------------------------------------------------------------------
def changed(**values: Any) -> Callable[[Path], list[str]]:
    """A second row with other values."""

    def flags(path: Path) -> list[str]:
        rows = [question(0, 20), {**question(1, 20), **values}]
        (path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return ["--train_file", str(path / "data.jsonl")]

    return flags


def no_rows(path: Path) -> list[str]:
    pq.write_table(pa.Table.from_pylist([question(0, 20)]).slice(0, 0), path / "empty.parquet")
    return ["--train_file", str(path / "empty.parquet")]


def wrong_nesting(path: Path) -> list[str]:
    (path / "data.json").write_text(json.dumps({"data": [{"paragraphs": [{"text": "w1"}]}]}))
    return ["--train_file", str(path / "data.json")]


def yaml_key(path: Path) -> list[str]:
    (path / "run.yaml").write_text("stride: 8\n")
    return ["--config", str(path / "run.yaml")]


MISTAKES: list[tuple[Any, str]] = [
    (["--context_column", "passage"], "--context_column 'passage' is not a column of the data"),
    (["--answer_column", "reply"], "--answer_column 'reply' is not a column of the data"),
    (["--max_length", "100"], "--max_length must be at most 64, the number of positions the model has; got 100"),
    (["--doc_stride", "36"], "have room for 35 of the context, which must be more than --doc_stride 36"),
    (["--doc_stride", "0"], "--doc_stride must be at least 1"),
    (["--no_stride"], "and --no_stride reads them in one row of at most 40"),
    (["--striding", "8"], "'--striding' is not a flag of this recipe"),
    (["--model_name_or_path", "vit"], "There is no tokenizer in 'vit'"),
    (["--do_predict"], "The run needs test data"),
    (
        changed(answers={"text": ["w1 w2"], "answer_start": [3]}),
        "Row 1 of the train data: the context must hold the answer 'w1 w2' at character 3 (answer_start)",
    ),
    (changed(answers={"text": [], "answer_start": []}), "Row 1 of the train data has no answer."),
    (changed(answers={"text": ["w1", "w2"], "answer_start": [0]}), "must hold texts and as many answer_start"),
    (changed(question=None), "Row 1 of the train data: column 'question' must hold text; got None"),
    (no_rows, "has no rows."),
    (wrong_nesting, "must hold SQuAD's JSON"),
    (yaml_key, "'stride' is not a flag of this recipe"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=lambda value: getattr(value, "__name__", None))
def test_mistakes_get_one_line(
    folder: Path,
    tmp_path: Path,
    changes: Any,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    flags = changes(tmp_path) if callable(changes) else changes
    argv = arguments(folder, tmp_path / "out", "bert", "eva", *flags)
    assert_mistake(question_answering.main, argv, message, tmp_path / "out", capsys)


def test_a_slow_tokenizer_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SimpleNamespace(is_fast=False)
    monkeypatch.setattr(question_answering, "load_tokenizer", lambda *_: slow)
    argv = arguments(folder, tmp_path / "out")
    assert_mistake(question_answering.main, argv, "does not say where its tokens are", tmp_path / "out", capsys)
