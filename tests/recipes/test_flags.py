"""The flags of the recipes: YAML files, mistakes, and the line that says what runs."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cases import BERT
from transformers import GPT2Config

import hf_linattn
from hf_linattn import FavorPlusConfig
from parts.common import RecipeError
from parts.data import DataArguments
from parts.finetuning import describe, read_flags
from parts.models import override

SCRIPTS = [path.stem for path in sorted(Path("recipes").glob("*.py")) if "\nfrom parts." in path.read_text()]
BASE = ["--model_name_or_path", "somewhere", "--output_dir", "out"]


def read(tmp_path: Path, content: str, *flags: str) -> Any:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    return read_flags(DataArguments, ["--config", str(path), *BASE, *flags], None)


def test_a_file_gives_flags_and_the_command_line_wins(tmp_path: Path) -> None:
    content = """
attention: eva
attention_config: {window_size: 4, num_chunks: 2}
learning_rate: 1e-3
per_device_train_batch_size: 4
do_train: true
bf16: false
report_to: [none]
max_train_samples: null
"""
    flags = read(tmp_path, content, "--per_device_train_batch_size", "2")
    assert flags.attention.settings() == {"window_size": 4, "num_chunks": 2}
    assert flags.training.learning_rate == 1e-3
    assert flags.training.per_device_train_batch_size == 2
    assert (flags.training.do_train, flags.training.bf16, flags.training.report_to) == (True, False, [])
    assert flags.data.max_train_samples is None


def test_a_file_may_be_the_only_argument(tmp_path: Path) -> None:
    values = {"model_name_or_path": "somewhere", "output_dir": "out", "transfer_steps": 3}
    for name in ("run.json", "run.yaml"):  # JSON is YAML
        (tmp_path / name).write_text(json.dumps(values))
        assert read_flags(DataArguments, [str(tmp_path / name)], None).adaptation.transfer_steps == 3


def test_of_several_files_a_later_one_wins(tmp_path: Path) -> None:
    for name, content in {"task": "learning_rate: 1.0\nmax_steps: 3", "kind": "attention: eva\nmax_steps: 5"}.items():
        (tmp_path / f"{name}.yaml").write_text(content)
    files = [text for name in ("task", "kind") for text in ("--config", str(tmp_path / f"{name}.yaml"))]
    flags = read_flags(DataArguments, [*files, *BASE], None)
    assert (flags.attention.attention, flags.training.learning_rate, flags.training.max_steps) == ("eva", 1.0, 5)


@pytest.mark.parametrize(
    ("content", "other", "settings"),
    [
        ("attention: favor_plus\nnum_features: 8", "softmax", {}),
        ("attention: favor_plus\nnum_features: 8", "eva", {}),
        ("attention: favor_plus\nnum_features: 8", "favor_plus", {"num_features": 8}),
        ("num_features: 8", "favor_plus", {"num_features": 8}),
    ],
)
@pytest.mark.parametrize("source", ["command line", "file"])
def test_another_kind_does_not_get_the_settings(
    tmp_path: Path, content: str, other: str, settings: dict[str, Any], source: str
) -> None:
    changes = ["--attention", other]
    if source == "file":
        (tmp_path / "kind.yaml").write_text(f"attention: {other}")
        changes = ["--config", str(tmp_path / "kind.yaml")]
    flags = read(tmp_path, f"{content}\nmax_steps: 3", *changes)
    assert (flags.attention.attention, flags.attention.settings()) == (other, settings)
    assert flags.training.max_steps == 3


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ("atention: eva", [], "'atention' is not a flag of this recipe. Did you mean 'attention'?"),
        ("attention: eva: 1", [], "is not YAML"),
        ("- attention", [], "must hold 'flag: value' lines; got a list"),
        ("learning_rate: fast", [], "argument --learning_rate/--learning-rate: invalid float value: 'fast'"),
        ("", ["--lr", "1"], "'--lr' is not a flag of this recipe."),
        ("", ["--transfer_step=3"], "Did you mean '--transfer_steps'?"),
        ("", ["--transfer_steps", "-1"], "--transfer_steps must be at least 0; got -1."),
        ("", ["--max_train_samples", "0"], "--max_train_samples must be at least 1; got 0."),
        ("", ["--load_best_model_at_end"], "requires the save and eval strategy to match"),
        ("", ["--attention", "softmax", "--num_features", "8"], "takes no settings"),
    ],
)
def test_mistakes(tmp_path: Path, content: str, flags: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as raised:
        read(tmp_path, content, *flags)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_missing() -> None:
    with pytest.raises(RecipeError, match=r"'none\.yaml' cannot be read: No such file"):
        read_flags(DataArguments, ["--config", "none.yaml", *BASE], None)


def test_fields_of_a_config_that_are_not_set() -> None:
    config = GPT2Config()
    override(config, "n_layer=2,n_inner=16,attn_pdrop=0.0")
    assert (config.n_layer, config.n_inner, config.attn_pdrop) == (2, 16, 0.0)
    for text in ("n_inner", "n_iner=16", "n_layer=two"):
        with pytest.raises(RecipeError, match=f"must be fields of GPT2Config.*got {text!r}"):
            override(config, text)


def test_one_line_says_what_runs(tmp_path: Path) -> None:
    flags = read(tmp_path, "per_device_train_batch_size: 4\ngradient_accumulation_steps: 2")
    model = hf_linattn.convert(BERT.build(), FavorPlusConfig(num_features=8, window_size=4), layers=[1])
    line = describe(SimpleNamespace(model=model), flags.training)
    assert "favor_plus (num_features=8, window_size=4) in layers 1; 1 process on cpu" in line
    assert line.endswith("8 rows a step (4 in a batch x 2 batches x 1)")
    stock = describe(SimpleNamespace(model=BERT.build()), flags.training)
    assert ": softmax; 1 process" in stock


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_prints_its_flags(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).main()
    assert not stop.value.code
    assert "usage: " in capsys.readouterr().out
