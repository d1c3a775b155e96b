"""Trained models are compared row by row, in the right direction, with flags that the recipes have."""

from __future__ import annotations

import importlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hf_linattn.modules.registry import get_kind
from parts.finetuning import read_flags
from parts.training import ModelArguments, NewModelArguments

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("small_vit", "small_glue", "small_plays")


@pytest.fixture(autouse=True)
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    monkeypatch.syspath_prepend(str(ROOT / "experiments" / "papers"))
    return importlib.import_module("trained_models")


def test_all_are_in_the_table(script: Any) -> None:
    assert tuple(script.EXPERIMENTS) == NAMES == importlib.import_module("papers_table").TRAINED


@pytest.mark.parametrize("name", NAMES)
def test_runs_are_of_the_kind_they_say(
    script: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command line of every kind is read by its recipe, and all train alike."""
    experiment = script.EXPERIMENTS[name]
    recipe = importlib.import_module(experiment.recipe)
    model_class = ModelArguments if experiment.model == "--model_name_or_path" else NewModelArguments
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    training = []
    for kind in experiment.kinds:
        script.train(experiment, kind, 3, experiment.model and "a model", tmp_path / "out")
        program, *argv = commands[-1][1:]
        assert Path(program).stem == experiment.recipe
        flags = read_flags(recipe.ARGUMENTS, argv, None, quiet=True, model_class=model_class)
        assert flags.attention.attention == kind
        assert flags.training.seed == 3
        if kind != "softmax":
            get_kind(kind).config_cls(**flags.attention.settings())
        training.append((flags.training.to_dict(), flags.data, flags.model))
    assert all(each == training[0] for each in training)


SCORES = {"softmax": [3.0, 4.0, 5.0], "favor_plus": [1.0, 2.1, 3.0], "lara": [2.0, 3.0, 4.0], "eva": [3.0, 4.1, 5.1]}


@pytest.mark.parametrize(
    ("metric", "agrees"), [("accuracy", ["yes", "yes", "undecided"]), ("nll", ["no", "no", "undecided"])]
)
def test_claims(script: Any, metric: str, agrees: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def score(experiment: Any, checkpoint: Path) -> dict[str, Any]:
        scores = SCORES.get(checkpoint.name.partition("-")[0], SCORES["softmax"])
        return {"scores": scores, "metrics": [metric], metric: sum(scores) / 3, "main_metric": metric, "rows": 3}

    def train(experiment: Any, kind: str, seed: int, model: str | None, output: Path) -> None:
        output.mkdir(parents=True)
        (output / "results.json").touch()

    monkeypatch.setattr(script, "train", train)
    monkeypatch.setattr(script, "score", score)
    script.main("small_vit", seeds="0,1", runs=tmp_path, out=tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert [claim["agrees"] for claim in found["claims"]] == agrees
    assert [(row["attention"], row["seed"]) for row in found["rows"]][:2] == [("softmax", 0), ("favor_plus", 0)]
    assert len(found["rows"]) == 10
    (tmp_path / "small_vit" / "lara-1" / "results.json").unlink()
    script.main("small_vit", seeds="0,1", runs=tmp_path, finished=True, out=tmp_path / "out.json")
    again = json.loads((tmp_path / "out.json").read_text())
    assert len(again["rows"]) == 9
    assert again["claims"][0]["figure"].count("±") == 1
    assert again["claims"][2] == found["claims"][2]
    assert found["rows"][1]["better than softmax by"]["mean"] == pytest.approx(
        -59 / 30 if metric == "accuracy" else 59 / 30
    )


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        (
            "imagenet",
            None,
            "The experiment must be one of ['small_vit', 'small_glue', 'small_plays']; got 'imagenet'.",
        ),
        ("small_vit", "vit", "--model is not used in small_vit."),
        ("small_glue", None, "--model is needed for small_glue."),
    ],
)
def test_mistakes(script: Any, name: str, model: str | None, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        script.main(name, model)
    assert capsys.readouterr().err == f"error: {message}\n"
