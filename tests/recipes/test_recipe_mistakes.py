"""A mistake on the command line of a recipe is one line that says what to do, status 2, and nothing is written."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_checkpoints import build, encoded
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from parts import common

BERT, GPT2 = "--model_name_or_path {bert-classifier} ", "--model_name_or_path {gpt2} "
VIT, PLAIN = "--model_name_or_path {vit} ", "--model_name_or_path {bert} "
TRAIN = "--do_train --max_steps 1 "
TEXTS, ROWS, QUESTIONS = TRAIN + "--train_file {text.jsonl} ", TRAIN + "--train_file {labelled.jsonl} ", TRAIN
ALREADY = "does nothing without --"

MISTAKES = {
    "text_classification": [
        # -- flags that would do nothing
        (BERT + ROWS + "--layers 0", "--layers are those that a kind converts; --attention keep converts none"),
        (BERT + ROWS + "--transfer_learning_rate 0.5", f"{ALREADY}transfer_steps"),
        (BERT + ROWS + "--lora_r 4", f"{ALREADY}lora_target_modules"),
        (BERT + ROWS + "--extend_method interpolate", f"{ALREADY}extend_positions"),
        (BERT + ROWS + "--shuffle_buffer 5", f"{ALREADY}streaming"),
        (BERT + ROWS + "--dataset_config_name en", f"{ALREADY}dataset_name"),
        (BERT + ROWS + "--transfer_steps 2", "--transfer_steps needs a kind of linear attention"),
        (
            BERT + "--do_eval --validation_file {labelled.jsonl} --transfer_steps 2 --attention eva",
            "--transfer_steps needs --do_train",
        ),
        (
            BERT + "--do_eval --validation_file {labelled.jsonl} --lora_target_modules query",
            "--lora_target_modules needs --do_train",
        ),
        # -- values
        (BERT + ROWS + "--max_length -5", "--max_length must be at least 3"),
        (BERT + ROWS + "--max_length 0", "--max_length must be at least 3"),
        (BERT + ROWS + "--max_length 2", "--max_length must be at least 3"),
        (BERT + ROWS + "--max_length 65", "Longer inputs need --extend_positions 65"),
        (BERT + ROWS + "--lora_target_modules query --lora_dropout 3", "--lora_dropout must be at least 0"),
        (BERT + ROWS + "--lora_target_modules ,", "--lora_target_modules must name modules"),
        (BERT + ROWS + "--lora_target_modules LayerNorm", "LayerNorm"),
        (BERT + ROWS + "--per_device_train_batch_size 0", "--per_device_train_batch_size must be at least 1"),
        (BERT + ROWS + "--gradient_accumulation_steps 0", "--gradient_accumulation_steps must be at least 1"),
        (BERT + ROWS + "--train_sampling_strategy longest", "must be one of group_by_length, random, sequential"),
        (BERT + ROWS + "--report_to nowhere", "nowhere is not supported"),
        (BERT + ROWS + "--output_dir {text.txt}", "--output_dir must be a folder"),
        (BERT + ROWS + "--push_to_hub", "--push_to_hub: no repository"),
        # -- data
        (BERT + TRAIN + "--dataset_name no/such", "--dataset_name 'no/such' cannot be read"),
        (BERT + TRAIN + "--train_file {empty.jsonl}", "has no rows"),
        (BERT + TRAIN + "--train_file {broken.jsonl} --streaming", "The train data cannot be read: JSON parse error"),
        (BERT + TRAIN + "--train_file {unlabelled.jsonl}", "No column is called 'label'"),
        (BERT + TRAIN + "--train_file {missing.jsonl}", "must hold class labels (whole numbers or text); got None"),
        # -- models
        ("--model_name_or_path {nowhere} " + ROWS, "There is no folder"),
        ("--model_name_or_path {distil} --attention eva " + ROWS, "Conversion is implemented for"),
        ("--model_name_or_path {no_tokenizer} " + ROWS, "only a model: name one with --tokenizer_name"),
        (VIT + ROWS, "There is no tokenizer in"),
    ],
    "language_modeling": [
        (GPT2 + TEXTS + "--mlm_probability 0.3", "--mlm_probability 0.3 is for --objective masked"),
        ("--model_type gpt2 --tokenizer_name {no_tokenizer} " + TEXTS, "There is no tokenizer in"),
        (GPT2 + TRAIN + "--train_file {broken.jsonl} --streaming", "The train data cannot be read"),
    ],
    "question_answering": [
        (PLAIN + QUESTIONS + "--no_stride --doc_stride 8", "--doc_stride 8 does nothing with --no_stride"),
        (PLAIN + QUESTIONS + "--null_score_diff_threshold 3", f"{ALREADY}version_2_with_negative"),
    ],
    "image_classification": [
        (VIT + TRAIN + "--train_file {images.parquet} --image_column label", "cannot hold both images and labels"),
        (VIT + TRAIN + "--train_file {deep.parquet}", "is an image of mode 'I;16'"),
    ],
    "attention_transfer": [
        ("--model_name_or_path {nowhere} --attention eva " + TEXTS, "There is no folder"),
        ("--model_name_or_path {strange} --attention eva " + TEXTS, "cannot be loaded"),
        ("--model_name_or_path {no_tokenizer} --attention eva " + TEXTS, "There is no tokenizer in"),
        (GPT2 + TEXTS + "--attention eva --max_length 0", "--max_length must be at least 1"),
        (GPT2 + TEXTS + "--attention eva --shuffle_buffer 5", f"{ALREADY}streaming"),
        (GPT2 + TEXTS + "--attention eva --eval_strategy best", "argument --eval_strategy"),
    ],
    "long_range_arena": [
        ("--task image " + TRAIN + "--train_file {deep.parquet}", "an image of mode 'I;16'"),
        ("--task text " + TRAIN + "--train_file {labelled.jsonl} --transfer_steps 2", "needs a kind of linear"),
    ],
    "evaluate_checkpoint": [
        ("--model_name_or_path {strange} --test_file {labelled.jsonl}", "cannot be loaded"),
    ],
}
CASES = [(recipe, line, words) for recipe, cases in MISTAKES.items() for line, words in cases]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mistakes")
    build(path)
    shutil.copytree(path / "bert-classifier", path / "no_tokenizer")
    for file in (path / "no_tokenizer").glob("tokenizer*"):
        file.unlink()
    config = DistilBertConfig(vocab_size=60, dim=16, hidden_dim=16, n_layers=1, n_heads=2, max_position_embeddings=64)
    DistilBertForSequenceClassification(config).save_pretrained(path / "distil")
    shutil.copy(path / "bert" / "tokenizer.json", path / "distil")
    (path / "strange").mkdir()
    (path / "strange" / "config.json").write_text('{"model_type": "bertt"}')
    rows = [{"text": f"w{i} w{i + 1}", "label": i % 2} for i in range(20)]
    files = {"labelled": rows, "unlabelled": [{"text": row["text"]} for row in rows], "empty": []}
    files["missing"] = [*rows, {"text": "w1", "label": None}]
    for name, content in files.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (path / "broken.jsonl").write_text('{"text": "a", "label"\n')
    deep = [encoded(Image.fromarray(np.full((30, 26), 40000, np.uint16))) for _ in range(20)]
    pq.write_table(pa.table({"img": deep, "label": [i % 6 for i in range(20)]}), path / "deep.parquet")
    return path


@pytest.mark.parametrize(("recipe", "line", "words"), CASES, ids=[f"{recipe}: {words}" for recipe, _, words in CASES])
def test_one_line_status_2_and_nothing_written(
    recipe: str,
    line: str,
    words: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = [part if part[0] != "{" else str(folder / part[1:-1]) for part in line.split()]
    output = "--output" if recipe == "evaluate_checkpoint" else "--output_dir"
    argv += [] if output in argv else [output, str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", [f"{recipe}.py", *argv])
    with pytest.raises(SystemExit) as stop:
        common.run(importlib.import_module(recipe).main)
    assert stop.value.code == 2
    errors = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1
    assert words in errors[0]
    assert not (tmp_path / "out").exists()


def test_a_metric_that_does_not_exist(folder: Path, tmp_path: Path) -> None:
    """Known when the first evaluation is done; what it is called then is said."""
    import text_classification

    argv = (
        BERT
        + ROWS
        + "--do_eval --validation_file {labelled.jsonl} --eval_strategy steps --eval_steps 1 --save_steps 1"
    )
    argv = [part if part[0] != "{" else str(folder / part[1:-1]) for part in argv.split()]
    argv += ["--load_best_model_at_end", "--metric_for_best_model", "accurasy", "--output_dir", str(tmp_path)]
    with pytest.raises(common.RecipeError, match=r"must be one of loss, accuracy, .* Did you mean 'accuracy'\?"):
        text_classification.main([*argv, "--report_to", "none"])


@pytest.mark.parametrize("name", ["config", "help"])
def test_flags_that_a_file_cannot_give(name: str, tmp_path: Path) -> None:
    from parts.training import config_flags

    path = tmp_path / "run.yaml"
    path.write_text(f"{name}: other.yaml")
    with pytest.raises(common.RecipeError, match=f"'{name}' is a flag of the command line alone"):
        config_flags([str(path)], {"--config": None, "--help": None})
