"""The recipes, run as a user runs them: as programs, for two steps, on tiny data, without a network."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from forked_programs import run_forked
from hub_server import environment, run
from huggingface_hub import ModelCard
from recipe_runs import text_classification, two_processes
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from recipes.build_documents import BuildError, build_documents
from recipes.parts.metrics import CLASSIFICATION, REGRESSION, LocalMetrics

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "bad", "good", "film", "not", "very", "plot", "the", "dull", "fine"]
RECIPE = "recipes/text_classification.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a tokenizer, and data files."""
    path = tmp_path_factory.mktemp("recipes")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **special).save_pretrained(path / "model")
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    BertForSequenceClassification(config).save_pretrained(path / "model")
    # No row and its neighbours are alike, and lengths differ: padding and grouping by length have something to do.
    texts = [" ".join(WORDS[4 + (i * j) % 10] for j in range(1, 6 + i % 20)) for i in range(24)]
    table = pa.table({"sentence": texts, "label": [i % 2 for i in range(24)]})
    pq.write_table(table, path / "data.parquet")
    pa_csv.write_csv(table, path / "data.csv")
    (path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    return path


def recipe(folder: Path, output: Path, *changes: str, data: str = "data.parquet", train: bool = True) -> list[str]:
    arguments = [RECIPE, "--model_name_or_path", str(folder / "model"), "--output_dir", str(output)]
    arguments += ["--validation_file", str(folder / data), "--do_eval", "--disable_tqdm", "true"]
    if train:
        arguments += ["--train_file", str(folder / data), "--do_train", "--max_steps", "2"]
        arguments += ["--per_device_train_batch_size", "4", "--save_steps", "1"]
    return [*arguments, *changes]


def child(folder: Path) -> dict[str, str]:
    return environment(HF_HOME=str(folder / "home"))


@pytest.fixture
def run_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Run a recipe in this process, which saves its imports. What is said of programs is tested with `run`."""
    from recipes import text_classification
    from recipes.parts import common

    programs = {RECIPE: text_classification.main}
    verbosity = transformers_logging.get_verbosity()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "home" / "datasets")  # not the user's

    def run(arguments: list[str], *, mistake: bool = False) -> None:
        monkeypatch.setattr(sys, "argv", arguments)
        run_main = sys.modules.get("parts.common", common).run
        if not mistake:
            return run_main(programs[arguments[0]])
        with pytest.raises(SystemExit) as stop:
            run_main(programs[arguments[0]])
        assert stop.value.code == 2

    yield run
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()


def results(output: Path) -> dict[str, Any]:
    return json.loads((output / "results.json").read_text())


# -- text_classification.py ----------------------------------------------------------------------------------------
def test_converted_run_and_resume(
    folder: Path, tmp_path: Path, run_here: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    kind = ["--attention", "favor_plus", "--window_size", "4", "--num_features", "8", "--layers", "1"]
    run(recipe(folder, output, *kind, "--bf16", "--base_model", "some/base"), child(folder))
    found = results(output)
    assert found["attention"]["kind"] == "favor_plus"
    assert found["attention"]["num_features"] == 8
    assert found["attention"]["layers"] == [1]
    assert set(found["metrics"]) == {"train", "eval"}
    assert 0 <= found["metrics"]["eval"]["eval_accuracy"] <= 1
    assert "eval_f1" in found["metrics"]["eval"]
    assert found["seconds"] > 0
    assert found["versions"]["transformers"]
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {path.name for path in output.iterdir()}
    card = ModelCard.load(output / "README.md")
    assert card.data.base_model == "some/base"
    assert f"| accuracy | {found['metrics']['eval']['eval_accuracy']:.4g} |" in card.text

    # Cut short after the first step, the run goes on by itself and ends with the same weights.
    whole = load_file(output / "model.safetensors")
    shutil.rmtree(output / "checkpoint-2")
    done = run_forked(recipe(folder, output, *kind, "--bf16"), child(folder))
    assert "Resuming from" in done.stderr
    assert [entry["step"] for entry in results(output)["log"]][-1] == 2
    again = load_file(output / "model.safetensors")
    assert all((again[name] == value).all() for name, value in whole.items())

    # Other settings would load these weights silently: refused.
    run_here(recipe(folder, output, "--attention", "eva"), mistake=True)
    assert "was trained with other attention settings" in capsys.readouterr().err

    # The checkpoint as a starting point: kept as it is, evaluated alone.
    source = ["--model_name_or_path", str(output)]
    run_here(recipe(folder, tmp_path / "kept", *source, train=False))
    kept = results(tmp_path / "kept")
    assert kept["attention"]["kind"] == "favor_plus"
    assert kept["metrics"]["eval"]["eval_accuracy"] == results(output)["metrics"]["eval"]["eval_accuracy"]


@pytest.mark.parametrize("launcher", ["forked", pytest.param("accelerate", marks=pytest.mark.slow)])
def test_text_classification_on_two_processes(
    folder: Path, tmp_path: Path, launcher: str, run_here: Callable[..., None]
) -> None:
    """Both give the same; in tests/recipes/test_slurm.py Accelerate's launcher runs by default."""
    argv = recipe(folder, tmp_path / "two", "--attention", "eva", "--learning_rate", "0")
    if launcher == "forked":
        two_processes(text_classification.main, argv[1:], tmp_path)
    else:
        launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
        launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
        run([*launch, *argv], child(folder) | {"ACCELERATE_USE_CPU": "true"})
    run_here(recipe(folder, tmp_path / "one", "--attention", "eva", "--learning_rate", "0"))
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    assert (one["processes"], two["processes"]) == (1, 2)
    # Nothing was learned, so both evaluate the same weights: same metrics, and a loss not summed over processes.
    for name in ("eval_accuracy", "eval_f1"):
        assert two["metrics"]["eval"][name] == pytest.approx(one["metrics"]["eval"][name])
    assert two["metrics"]["eval"]["eval_loss"] == pytest.approx(one["metrics"]["eval"]["eval_loss"], rel=1e-6)
    norms = [max(entry.get("grad_norm", 0) for entry in x["log"]) for x in (one, two)]
    assert two["metrics"]["train"]["train_loss"] == pytest.approx(one["metrics"]["train"]["train_loss"], rel=0.2), (
        norms
    )


@pytest.mark.parametrize("data", ["data.csv", "data.jsonl"])
def test_local_formats(folder: Path, tmp_path: Path, data: str, run_here: Callable[..., None]) -> None:
    run_here(recipe(folder, tmp_path / "a", data=data, train=False))
    run_here(recipe(folder, tmp_path / "b", train=False))
    same, parquet = results(tmp_path / "a")["metrics"]["eval"], results(tmp_path / "b")["metrics"]["eval"]
    assert same["eval_accuracy"] == parquet["eval_accuracy"]
    assert same["eval_loss"] == pytest.approx(parquet["eval_loss"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["--text_column", "body"],
            "--text_column 'body' is not a column of the data; columns: ['sentence', 'label']",
        ),
        (["--label_column", "sentiment"], "--label_column 'sentiment' is not a column of the data"),
        (["--label_column", "sentence"], "holds 24 different labels"),
        (["--attention", "favour_plus"], "Did you mean 'favor_plus'?"),
        (["--attention", "eva", "--num_features", "4"], "EvaConfig has no field 'num_features'"),
        (["--attention", "softmax", "--window_size", "4"], "--attention softmax takes no settings"),
        (["--attention_config", "{oops"], "--attention_config must be JSON"),
        (["--max_length", "100"], "--max_length must be at most 64"),
        (["--validation_file", "none.parquet"], "'none.parquet' does not exist"),
        (["--validation_file", "data.txt"], "--validation_file must be one of"),
        (["--do_predict"], "needs test data"),
    ],
)
def test_mistakes_get_a_clear_error(
    folder: Path,
    tmp_path: Path,
    changes: list[str],
    message: str,
    run_here: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if message.startswith("holds"):  # few rows: every sentence would pass for a class
        message = "holds"
        monkeypatch.setattr("parts.labels.MAX_LABELS", 5)
    run_here(recipe(folder, tmp_path / "out", *changes), mistake=True)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "results.json").exists()


def test_labels_keep_the_order_of_the_checkpoint(folder: Path, tmp_path: Path, run_here: Callable[..., None]) -> None:
    """A checkpoint that calls output 0 "pos" must not be evaluated with the data's alphabetical order."""
    shutil.copytree(folder / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"id2label": {"0": "pos", "1": "neg"}, "label2id": {"pos": 0, "neg": 1}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    rows = pq.read_table(folder / "data.parquet").to_pylist()
    named = pa.table({"text": [r["sentence"] for r in rows], "label": [["pos", "neg"][r["label"]] for r in rows]})
    pq.write_table(named, tmp_path / "named.parquet")
    changes = ["--model_name_or_path", str(tmp_path / "model"), "--validation_file", str(tmp_path / "named.parquet")]
    run_here(recipe(folder, tmp_path / "a", *changes, train=False))
    run_here(recipe(folder, tmp_path / "b", train=False))
    assert results(tmp_path / "a")["data"]["labels"] == {"neg": 1, "pos": 0}
    assert results(tmp_path / "a")["metrics"]["eval"]["eval_loss"] == pytest.approx(
        results(tmp_path / "b")["metrics"]["eval"]["eval_loss"]
    )


# -- the others ----------------------------------------------------------------------------------------------------
def test_metrics_need_no_hub() -> None:
    values = LocalMetrics(CLASSIFICATION, 2).compute(predictions=[0, 1, 1, 1], references=[0, 1, 0, 1])
    assert values == pytest.approx({"accuracy": 0.75, "f1": 0.8})
    values = LocalMetrics(CLASSIFICATION, 3).compute(predictions=[0, 1, 2], references=[0, 1, 1])
    assert values == pytest.approx({"accuracy": 2 / 3, "f1": (1 + 2 / 3 + 0) / 3})
    values = LocalMetrics(REGRESSION).compute(predictions=[0.0, 1.0, 4.0], references=[0.0, 1.0, 2.0])
    assert values == pytest.approx({"pearson": 5 / (2 * 13) ** 0.5 / 1.0, "spearmanr": 1, "mse": 4 / 3}, rel=0.05)


def test_documents_have_a_majority_and_no_repetition() -> None:
    sentences = [f"n{i} ." for i in range(30)] + [f"p{i} ." for i in range(30)] + ["n0 ."]
    labels = [0] * 30 + [1] * 30 + [0]
    texts, targets = build_documents(sentences, labels, documents=10, seed=3)
    assert (texts, targets) == build_documents(sentences, labels, documents=10, seed=3)
    assert texts != build_documents(sentences, labels, documents=10, seed=4)[0]
    assert sorted(targets) == [0] * 5 + [1] * 5
    orders = set()
    for text, target in zip(texts, targets, strict=True):
        parts = text.removesuffix(" .").split(" . ")
        assert len(parts) == len(set(parts)) == 16
        assert sum(part.startswith("np"[target]) for part in parts) == 10
        orders.add("".join(part[0] for part in parts))
    assert len(orders) > 5
    with pytest.raises(BuildError, match="a document needs 10"):
        build_documents(sentences[25:35], labels[25:35], documents=1)
    with pytest.raises(BuildError, match="exactly two labels"):
        build_documents(["a"], [0], documents=1)
    with pytest.raises(BuildError, match="more than half"):
        build_documents(sentences, labels, documents=1, majority=8)


# -- what is uploaded ----------------------------------------------------------------------------------------------
SECRETS = {".env": "KEY=1", "id_ed25519": "PRIVATE", "notes.txt": "mine", "model.key": "x", "runs/events": "log"}


def strew(output: Path, outside: Path) -> None:
    """Things that people have in an output folder, and links to what is elsewhere."""
    outside.mkdir(exist_ok=True)
    (outside / "passwords").write_text("secret")
    for place in (output, *output.glob("checkpoint-*")):
        for name, content in SECRETS.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(content)
        for name in ("link.txt", "tokenizer.model", "rng_state_7.pth", "README.md"):
            (place / name).unlink(missing_ok=True)
            (place / name).symlink_to(outside / "passwords")
        (place / "folder").symlink_to(outside)


PUSH = """
import runpy, sys, pathlib
sys.path[:0] = ["tests", "tests/recipes", "recipes"]
from test_recipes import strew
from transformers import Trainer
output, outside = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
output.mkdir()
save = Trainer._save_optimizer_and_scheduler
def saving(self, folder):  # while the checkpoint is written: before it is pushed
    save(self, folder)
    strew(pathlib.Path(folder), outside)
Trainer._save_optimizer_and_scheduler = saving
strew(output, outside)
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
MODEL = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
RESUME = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}


@pytest.mark.hub
@pytest.mark.parametrize(
    ("strategy", "attention"),
    [
        ("all_checkpoints", "lara"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("end", "lara"), ("every_save", "softmax"), ("checkpoint", "lara"))
        ),
    ],
)
def test_nothing_but_the_model_is_uploaded(strategy: str, attention: str, folder: Path, tmp_path: Path) -> None:
    from recipes.local_hub import LocalHub

    output = tmp_path / "out"
    kind = ["--attention", attention, *(["--num_landmarks", "2", "--window_size", "0"] if attention == "lara" else [])]
    hub_options = ["--push_to_hub", "--hub_model_id", "local/it", "--hub_strategy", strategy]
    hub_options += ["--hub_always_push", "true", "--hub_token", "hf_not_to_be_seen"]
    arguments = recipe(folder, output, *kind, *hub_options)
    with LocalHub() as hub:
        env = environment(**hub.environment(folder / "home"), HF_HUB_OFFLINE="0")
        run_forked(["-c", PUSH, str(output), str(tmp_path / "outside"), *arguments], env)
    repo = hub.repos["local/it"]
    everything = {path for files in repo.commits.values() for path in files}
    expected = MODEL | {"README.md"}
    prefixes = {"checkpoint": ["last-checkpoint"], "all_checkpoints": ["checkpoint-1", "checkpoint-2"]}
    for prefix in prefixes.get(strategy, []):
        expected |= {f"{prefix}/{name}" for name in MODEL | RESUME}
    assert everything == expected
    assert len(repo.commits) > 3 or strategy == "end"  # also while it trained
    published = [hub.blobs[digest] for files in repo.commits.values() for digest in files.values()]
    for content in [*SECRETS.values(), "secret", "hf_not_to_be_seen", str(tmp_path)]:
        assert len(content) < 4 or not any(content.encode() in blob for blob in published), content
    assert results(output)["training"]["hub_strategy"] == strategy
    card = hub.blobs[repo.commits[repo.branches["main"]]["README.md"]].decode()
    assert ("## Limits" in card) == (attention == "lara")
    assert (tmp_path / "outside" / "passwords").read_text() == "secret"
