"""The experiment on attention transfer: what its tasks score, what it trains, and its teacher."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import GPT2

import hf_linattn
from hf_linattn import FavorPlusConfig

SMALL = {"window_size": 4, "num_features": 4}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "experiments"))
    import transfer_quality

    return transfer_quality


@pytest.fixture
def teacher(script: Any) -> Any:
    from teachers import recall

    return recall


@pytest.fixture
def task(script: Any, teacher: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Recall by an untrained teacher, with few rows."""
    import transfer_tasks.recall

    teacher.untrained(0).save_pretrained(tmp_path / "teacher")
    for name, value in {"few_rows": 2, "rows": 4}.items():
        monkeypatch.setattr(transfer_tasks.recall.Task, name, value)
    monkeypatch.setattr(transfer_tasks.recall, "ROWS", 2)
    made = script.load_task("recall", script.Files(tmp_path / "teacher"))
    settings = {"learned": FavorPlusConfig(learned=True, **SMALL), "random": FavorPlusConfig(**SMALL)}
    monkeypatch.setattr(made, "settings", lambda: settings)
    monkeypatch.setattr(script, "load_task", lambda name, files: made)
    return made


def test_every_task_is_a_file(script: Any) -> None:
    folder = Path(script.__file__).parent / "transfer_tasks"
    assert sorted(script.TASKS) == sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")


def test_perplexity_is_that_of_all_rows(script: Any) -> None:
    from transfer_tasks.gpt2 import perplexity

    model, rows = GPT2.build(), GPT2.inputs(5)["input_ids"]
    with torch.no_grad():
        expected = float(model(rows, labels=rows).loss.exp())
    assert perplexity(model, rows) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("ask_in_gap", [False, True])
def test_facts_are_named_once_and_asked_for_later(teacher: Any, ask_in_gap: bool) -> None:
    batch = teacher.sample(3, torch.Generator().manual_seed(0), ask_in_gap=ask_in_gap)
    for ids, before, labels in zip(*(batch[key] for key in ("input_ids", "token_type_ids", "labels")), strict=True):
        facts = dict(ids[: teacher.FACTS].view(-1, 2).tolist())
        assert len(facts) == teacher.PAIRS
        asked = labels != teacher.IGNORED
        assert int(asked.sum()) == teacher.ASKED + (teacher.PAIRS if ask_in_gap else 0)
        for place in asked.nonzero().flatten().tolist():
            assert int(labels[place]) == int(ids[place]) == facts[int(ids[place - 1])]
            assert place - 1 - (ids[: teacher.FACTS] == ids[place - 1]).nonzero()[0] > 0
        assert torch.equal(before[1:], ids[:-1] + teacher.WORDS)


def test_only_right_answers_are_counted(teacher: Any) -> None:
    ids = teacher.test_rows(2)
    logits = torch.nn.functional.one_hot(ids.roll(-1, 1), 2 * teacher.WORDS).float()
    assert bool(teacher.answers(logits, ids).all())
    logits[0, teacher.FACTS + teacher.GAP] = 0
    assert int(teacher.answers(logits, ids).sum()) == 2 * teacher.ASKED - 1


def test_teacher_is_deterministic(teacher: Any) -> None:
    def trained(seed: int) -> dict[str, torch.Tensor]:
        model = teacher.untrained(seed)
        teacher.train(model, steps=2, learning_rate=1e-3, rows=2, seed=seed)
        return dict(model.state_dict())

    first, second, other = trained(0), trained(0), trained(1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_cached_recall_is_recall(task: Any) -> None:
    score = task.score(hf_linattn.convert(task.model, task.settings()["learned"], copy=True).eval())
    assert score["cached"] == score["recall"]
    assert score["largest difference of a logit"] < 1e-4


def test_results(script: Any, task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transfer_tasks.recall

    monkeypatch.setattr(transfer_tasks.recall, "cached", lambda model, rows: {})  # token by token is slow
    out = tmp_path / "out.json"
    script.main("recall", steps=2, second_stage=1, fine_tune=1, seeds="0,1", rows="learned,random", out=out)
    softmax, *rows = json.loads(out.read_text())["rows"]
    assert set(softmax) == {"attention", "trained", "trained, few"}
    assert [(row["attention"], row["seed"], row["settings"]["seed"]) for row in rows] == [
        (name, seed, seed) for name, seed in itertools.product(("learned", "random"), (0, 1))
    ]
    learned, random = rows[0], rows[2]
    assert {"untrained, few", "window_alone, few", "shuffled_slots, few", "trained", "fine-tuned"} <= set(learned)
    assert len(learned["errors"]) == 2
    assert "trained" not in random
    assert {"untrained", "fine-tuned"} <= set(random)


def test_softmax_is_left_alone(script: Any, task: Any) -> None:
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    script.main("recall", steps=1, fine_tune=1, rows="learned")
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.model.state_dict().items())


@pytest.mark.parametrize(("arguments", "said"), [(("gpt3",), "gpt3"), (("recall", "lara*"), "lara")])
def test_unknown_names(script: Any, task: Any, arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        script.main(arguments[0], rows=arguments[1] if arguments[1:] else "*")


@pytest.mark.parametrize("name", ["gpt2", "recall"])
def test_missing_files(script: Any, name: str) -> None:
    with pytest.raises(SystemExit, match="--model"):
        script.main(name)


def test_no_labels_to_fine_tune_on(script: Any, task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(type(task), "labelled_batches")
    with pytest.raises(SystemExit, match="no labels"):
        script.main("recall", fine_tune=1)
