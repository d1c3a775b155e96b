"""The token classification recipe on tiny models: tags and tokens, metrics, how it goes on; and the data it is for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from recipe_runs import assert_mistake, assert_same_weights, pushed, train, two_processes
from tiny_checkpoints import build
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transfer_recipe import arguments as transfer_arguments
from transformers import AutoModelForTokenClassification, AutoTokenizer, EvalPrediction, PreTrainedTokenizerFast

import evaluate_checkpoint
import token_classification
from build_documents import BuildError
from build_truecasing import build_rows
from parts.labels import Labels
from token_classification import IGNORED, choose_metrics, score, tagging_function

RECIPE = "recipes/token_classification.py"
NAMES = ["B-a", "B-b", "I-a", "O"]


def tag(word: str) -> str:
    number = int(word[1:])
    return NAMES[number % 4] if number < 20 else "O"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and words with tags as text (`tagged.jsonl`) and as numbers with names (`tagged.parquet`)."""
    path = tmp_path_factory.mktemp("token_classification")
    build(path)
    lines = [json.loads(line)["text"].split() for line in (path / "text.jsonl").read_text().splitlines()]
    rows = [
        {"tokens": words, "ner_tags": [tag(word) for word in words], "id": i} for i, words in enumerate(lines[:24])
    ]
    (path / "tagged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    feature = {"tokens": datasets.List(datasets.Value("string")), "id": datasets.Value("int64")}
    feature["ner_tags"] = datasets.List(datasets.ClassLabel(names=NAMES))
    datasets.Dataset.from_list(rows, datasets.Features(feature)).to_parquet(path / "tagged.parquet")
    return path


def arguments(folder: Path, output: Path, family: str = "bert", kind: str = "favor_plus", *changes: str) -> list[str]:
    """The command line of six steps, which is one epoch."""
    argv = transfer_arguments(folder, output, family, kind, "--learning_rate", "1e-2", "--max_eval_samples", "24")
    data = str(folder / "tagged.jsonl")
    argv[argv.index("--train_file") + 1] = data
    argv[argv.index("--max_length") + 1] = "64"
    return [*argv, "--validation_file", data, *changes]


def run(argv: list[str]) -> dict[str, Any]:
    return token_classification.main(argv, quiet=True)


def metrics_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "results.json").read_text())["metrics"]["eval"]


# -- tags and tokens ----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Of pieces of words."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "new", "york", "##er", "##s", "live"]
    made = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")


@pytest.mark.parametrize(
    ("max_length", "every", "labels", "cut"),
    [
        (20, False, [IGNORED, 0, 2, IGNORED, IGNORED, 3, IGNORED], 0),
        (20, True, [IGNORED, 0, 2, 2, 2, 3, IGNORED], 0),
        (6, True, [IGNORED, 0, 2, 2, 2, IGNORED], 1),
    ],
)
def test_the_first_token_of_a_word_has_its_tag(
    tokenizer: PreTrainedTokenizerFast, max_length: int, every: bool, labels: list[int], cut: int
) -> None:
    known = Labels("tags", {name: i for i, name in enumerate(NAMES)}, NAMES)
    tokenize = tagging_function(tokenizer, "words", known, max_length, every)
    rows = {"words": [["new", "yorkers", "live"], []], "tags": [["B-a", "I-a", "O"], []]}
    found = tokenize(rows)
    assert (found["labels"], found["cut"], found["length"]) == ([labels], [cut], [len(labels)])
    if every:  # the inside of an entity that begins here
        assert tokenize({"words": [["yorker"]], "tags": [["B-a"]]})["labels"] == [[IGNORED, 0, 2, IGNORED]]
        assert tokenize({"words": [["yorker"]], "tags": [["B-b"]]})["labels"] == [[IGNORED, 1, 1, IGNORED]]
    assert tokenize({"words": [[]], "tags": [[]]})["labels"] == []
    assert "labels" not in tokenize({"words": [["live"]]})


def test_numbers_with_names_are_the_names(folder: Path, tmp_path: Path) -> None:
    files = ["--train_file", str(folder / "tagged.parquet"), "--validation_file", str(folder / "tagged.parquet")]
    one, two = (
        run(arguments(folder, tmp_path / "a")),
        run(arguments(folder, tmp_path / "b", "bert", "favor_plus", *files)),
    )
    assert one["metrics"]["eval"]["eval_loss"] == two["metrics"]["eval"]["eval_loss"]
    assert two["data"]["labels"] == {str(i): i for i in range(4)}
    assert AutoModelForTokenClassification.from_pretrained(tmp_path / "b").config.id2label == dict(enumerate(NAMES))


def test_words_that_are_cut_are_told(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [json.loads(line) for line in (folder / "tagged.jsonl").read_text().splitlines()]
    beyond = [max(0, len(row["tokens"]) - 14) for row in rows]
    run(arguments(folder, tmp_path, "bert", "eva", "--max_length", "16", "--max_steps", "1"))
    rows_cut = sum(number > 0 for number in beyond)
    assert f"validation: 24 rows; of {rows_cut} of them {sum(beyond)} words are beyond 16 tokens" in caplog.text


def test_predictions(folder: Path, tmp_path: Path) -> None:
    """A line a row and a tag a word, from data with tags and without, in any batches."""
    run(arguments(folder, tmp_path / "a", "bert", "favor_plus"))
    rows = [json.loads(line)["tokens"] for line in (folder / "tagged.jsonl").read_text().splitlines()]
    rows = [*rows[:5], [], *rows[5:], ["w1"] * 70]
    for name in ("bare", "tagged"):
        lines = [{"tokens": row, **({"ner_tags": list(map(tag, row))} if name == "tagged" else {})} for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "bare.conll").write_text("\n".join("".join(f"{word}\n" for word in row) for row in rows))
    written = {}
    for name, size in (("bare.jsonl", 8), ("tagged.jsonl", 3), ("bare.conll", 1)):
        argv = ["--model_name_or_path", str(tmp_path / "a"), "--do_predict", "--test_file", str(tmp_path / name)]
        argv += ["--output_dir", str(tmp_path / name[:-2]), "--per_device_eval_batch_size", str(size)]
        found = run([*argv, "--report_to", "none", "--label_all_tokens"])
        assert ("test_f1" in found["metrics"]["test"]) == name.startswith("tagged")
        written[name] = (tmp_path / name[:-2] / "predictions.txt").read_text().splitlines()
    lines = [line.split() for line in written["bare.jsonl"]]
    assert [len(line) for line in lines] == [min(len(row), 62) for row in rows]  # 64 positions
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "a").eval()
    inputs = AutoTokenizer.from_pretrained(tmp_path / "a")(" ".join(rows[9]), return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs).logits[0, 1:-1].argmax(-1).tolist()
    assert lines[9] == [model.config.id2label[output] for output in outputs]
    assert written["tagged.jsonl"] == written["bare.jsonl"]
    assert written["bare.conll"] == [line for line in written["bare.jsonl"] if line]


@pytest.mark.parametrize("streaming", [(), ("--streaming",)])
def test_conll_files(folder: Path, tmp_path: Path, streaming: tuple[str, ...]) -> None:
    """They train as the same sentences in another format do."""
    rows = [json.loads(line) for line in (folder / "tagged.jsonl").read_text().splitlines()]
    pairs = [zip(row["tokens"], row["ner_tags"], strict=True) for row in rows]
    lines = ["".join(f"{word}\tX\t{tag}\n" for word, tag in sentence) for sentence in pairs]
    (tmp_path / "tagged.txt").write_text("\n".join(lines))
    losses = []
    for name, file in (("a", folder / "tagged.jsonl"), ("b", tmp_path / "tagged.txt")):
        files = ["--train_file", str(file), "--validation_file", str(file)]
        found = run(arguments(folder, tmp_path / name, "bert", "favor_plus", *files, *streaming))
        losses.append(found["metrics"]["eval"]["eval_loss"])
    assert losses[0] == losses[1]


# -- metrics ------------------------------------------------------------------------------------------------------
def test_entities_are_scored_whole() -> None:
    metrics = choose_metrics(Labels("tags", {}, NAMES))
    true = np.array([[0, 2, 3, 1, IGNORED], [0, 3, IGNORED, IGNORED, IGNORED]])
    found = np.array([[0, 3, 3, 1, 2], [0, 0, 0, 0, 0]])
    scores = score(EvalPrediction(found, true), metrics)
    assert scores.rows.tolist() == [0.75, 0.5]
    expected = {"precision": 2 / 4, "recall": 2 / 3, "f1": 4 / 7, "accuracy": 4 / 6}
    assert scores.metrics == pytest.approx(expected)


def test_other_tags_are_scored_one_by_one() -> None:
    metrics = choose_metrics(Labels("tags", {}, ["lower", "Title", "UPPER"]))
    scores = score(EvalPrediction(np.array([[0, 1, 1, 0]]), np.array([[0, 1, 2, IGNORED]])), metrics)
    assert scores.metrics == pytest.approx({"accuracy": 2 / 3, "f1": (1 + 2 / 3 + 0) / 3})


# -- whole runs ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("family", "kind", "changes"),
    [
        ("bert", "lara", ()),
        ("bert", "favor_sharp", ("--streaming", "--transfer_steps", "2", "--attention_config", '{"window_size": 2}')),
        pytest.param("gpt2", "favor_sharp", ("--lora_target_modules", "c_attn"), marks=pytest.mark.slow),
        pytest.param("bert", "eva", ("--label_all_tokens", "--num_train_epochs", "2"), marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_cut_ends_with_the_same_weights(
    folder: Path, tmp_path: Path, family: str, kind: str, changes: tuple[str, ...]
) -> None:
    whole, argv = (arguments(folder, tmp_path / name, family, kind, *changes) for name in ("whole", "cut"))
    train(whole, main=token_classification.main)
    train(argv, 5, token_classification.main)
    train(argv, main=token_classification.main)
    assert_same_weights(tmp_path / "cut", tmp_path / "whole")
    assert metrics_of(tmp_path / "cut")["eval_f1"] == metrics_of(tmp_path / "whole")["eval_f1"]


@pytest.mark.slow
def test_it_learns(folder: Path, tmp_path: Path) -> None:
    steps = ["--max_steps", "120", "--learning_rate", "3e-3", "--save_strategy", "no"]
    found = run(arguments(folder, tmp_path, "bert", "favor_plus", *steps))["metrics"]["eval"]
    assert found["eval_accuracy"] > 0.9
    assert found["eval_f1"] > 0.8


def test_a_checkpoint_keeps_its_tags(folder: Path, tmp_path: Path) -> None:
    found = run(arguments(folder, tmp_path / "a", "bert", "favor_plus"))["metrics"]["eval"]
    argv = arguments(folder, tmp_path / "b", "bert", "keep", "--model_name_or_path", str(tmp_path / "a"))
    del argv[argv.index("--attention_config") : argv.index("--attention_config") + 2]
    again = run([flag for flag in argv if flag != "--do_train"])["metrics"]["eval"]
    assert again["eval_loss"] == pytest.approx(found["eval_loss"], rel=1e-6)
    assert (again["eval_f1"], again["eval_accuracy"]) == (found["eval_f1"], found["eval_accuracy"])

    argv = ["--model_name_or_path", str(tmp_path / "a"), "--validation_file", str(folder / "tagged.jsonl")]
    args, data, _ = evaluate_checkpoint.read_flags([*argv, "--repeats", "1"])
    measured = evaluate_checkpoint.measure(args, data, str(tmp_path / "a"), False, "")
    assert (measured["f1"], measured["attention"]) == (found["eval_f1"], "favor_plus")


def test_two_processes_measure_what_one_does(folder: Path, tmp_path: Path) -> None:
    still = ["--learning_rate", "0", "--max_steps", "2", "--per_device_eval_batch_size", "2"]
    argv = [arguments(folder, tmp_path / name, "bert", "eva", *still) for name in ("one", "two")]
    for flags in argv:
        flags[flags.index("--max_eval_samples") + 1] = "13"
    one = run(argv[0])["metrics"]["eval"]
    two_processes(RECIPE, argv[1], folder / "home")
    assert json.loads((tmp_path / "two" / "results.json").read_text())["processes"] == 2
    for name in ("eval_accuracy", "eval_precision", "eval_recall", "eval_f1", "eval_loss"):
        assert metrics_of(tmp_path / "two")[name] == pytest.approx(one[name])


@pytest.mark.hub
def test_pushed_and_loaded(folder: Path, tmp_path: Path) -> None:
    code = """
import hf_linattn, transformers
model = transformers.AutoModelForTokenClassification.from_pretrained("local/it")
assert model.config.linear_attention["kind"] == "lara"
assert sorted(model.config.label2id) == ["B-a", "B-b", "I-a", "O"]
tag = transformers.pipeline("token-classification", "local/it", ignore_labels=[])
assert tag("w1 w2 w3")[0]["entity"] in model.config.label2id
"""
    files, card = pushed(RECIPE, arguments(folder, tmp_path / "out", "bert", "lara"), folder / "home", code)
    assert files == {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert f"| f1 | {metrics_of(tmp_path / 'out')['eval_f1']:.4g} |" in card


def test_longer_inputs(folder: Path, tmp_path: Path) -> None:
    found = run(arguments(folder, tmp_path, "bert", "eva", "--max_length", "96", "--extend_positions", "96"))
    assert found["data"]["max_length"] == 96
    model = AutoModelForTokenClassification.from_pretrained(tmp_path)
    assert model(torch.ones(1, 96, dtype=torch.long)).logits.shape == (1, 96, 4)
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == 96


# -- mistakes -----------------------------------------------------------------------------------------------------
ROWS = {
    "uneven": {"tokens": ["w1", "w2"], "ner_tags": ["O"]},
    "text": {"tokens": "w1 w2", "ner_tags": ["O", "B-a"]},
    "no_lists": {"tokens": ["w1"], "ner_tags": "O"},
    "missing": {"tokens": ["w1", "w2"], "ner_tags": None},
    "no_tag": {"tokens": ["w1", "w2"], "ner_tags": ["O", None]},
    "fractions": {"tokens": ["w1", "w2"], "ner_tags": [0.5, 1.5]},
    "numbers": {"tokens": [1, 2], "ner_tags": ["O", "B-a"]},
    "one_tag": {"tokens": ["w1", "w2"], "ner_tags": ["O", "O"]},
    "no_words": {"tokens": [], "ner_tags": []},
    "words_alone": {"tokens": ["w1", "w2"]},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--train_file", "uneven.jsonl"], "A row has 2 words and 1 tags: 'w1 w2'."),
        (["--train_file", "text.jsonl"], "Column 'tokens' must hold lists of words; got 'w1 w2'."),
        (["--train_file", "no_lists.jsonl"], "Column 'ner_tags' must hold lists of tags; got 'O'."),
        (["--train_file", "missing.jsonl"], "Column 'ner_tags' must hold lists of tags; got None."),
        (["--train_file", "no_tag.jsonl"], "of the train data must hold class labels"),
        (["--train_file", "fractions.jsonl", "--validation_file", "fractions.jsonl"], "it holds fractions"),
        (["--train_file", "numbers.jsonl"], "Column 'tokens' must hold lists of words; one of them is 1."),
        (["--train_file", "one_tag.jsonl", "--validation_file", "one_tag.jsonl"], "holds one label only"),
        (["--validation_file", "no_words.jsonl"], "The validation data has no row with words."),
        (["--train_file", "words_alone.jsonl"], "No column is called 'ner_tags' or 'tags'"),
        (["--validation_file", "words_alone.jsonl"], "The validation data has no column 'ner_tags'"),
        (["--text_column", "body"], "--text_column 'body' is not a column of the data"),
        (["--label_column", "id"], "Column 'id' must hold lists of tags; got 0."),
        (
            ["--train_file", "text.csv"],
            "must be one of ['.conll', '.json', '.jsonl', '.parquet', '.txt']; got",
        ),
        (["--train_file", "text.txt"], "line 2: every line must have 5 columns, as the first one; got ["),
        (["--validation_file", "empty.jsonl"], "has no rows"),
        (["--max_length", "100"], "--max_length must be at most 64"),
        (["--label_all"], "Did you mean '--label_all_tokens'?"),
        (["--config", "run.yaml"], "'labels_all' is not a flag of this recipe"),
        (["--model_name_or_path", "vit"], "A model of type 'vit' cannot tag tokens"),
        (["--model_name_or_path", "nowhere"], "'nowhere' cannot be loaded"),
    ],
)
def test_mistakes(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(folder)
    for name, row in ROWS.items():
        Path(f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    Path("empty.jsonl").write_text("")
    Path("run.yaml").write_text("labels_all: true")
    argv = arguments(folder, tmp_path / "out", "bert", "favor_plus", *changes)
    assert_mistake(token_classification.main, argv, message, tmp_path / "out", capsys)


def test_seqeval_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install seqeval"):
        choose_metrics(Labels("tags", {}, NAMES))


# -- words with known tags ----------------------------------------------------------------------------------------
def test_truecasing() -> None:
    text = "He met Anna , a well @-@ known NASA engineer . It was <unk> . Was it in May ?"
    heading = " = A heading = \n"
    ((words, tags),) = build_rows([heading, text, "ok"], words_per_row=10)
    assert words == "he met anna a well-known nasa engineer was it in may".split()
    assert tags == [
        "Title",
        "lower",
        "Title,",
        "lower",
        "lower",
        "UPPER",
        "lower.",
        "Title",
        "lower",
        "lower",
        "Title?",
    ]
    assert [len(row) for row, _ in build_rows([text] * 4, words_per_row=5)] == [7, 11, 11, 11]
    with pytest.raises(BuildError, match="no row of 12 words"):
        build_rows([text], words_per_row=12)
