"""The model card: what its header holds, what its text says, and that nobody's own card is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cases import BY_NAME, KINDS
from huggingface_hub import ModelCard

import hf_linattn
from hf_linattn.errors import ConfigError
from hf_linattn.hub import render_card, write_card
from hf_linattn.models import COUNTERPARTS
from hf_linattn.modules.registry import get_kind


def converted(kind: str = "favor_plus", name: str = "bert-classifier", **options: Any) -> Any:
    case = BY_NAME[name]
    return hf_linattn.convert(case.build(), case.settings(kind), **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "task", "auto_class"),
    [
        ("bert-classifier", "text-classification", "AutoModelForSequenceClassification"),
        ("bert-mlm", "fill-mask", "AutoModelForMaskedLM"),
        ("gpt2", "text-generation", "AutoModelForCausalLM"),
        ("vit", "image-classification", "AutoModelForImageClassification"),
    ],
)
def test_header_and_snippet(kind: str, name: str, task: str, auto_class: str, tmp_path: Path) -> None:
    path = write_card(converted(kind, name), tmp_path, base_model="some/base", license="mit", repo_id="me/it")
    card = ModelCard.load(path)
    assert path == tmp_path / "README.md"
    assert card.data.base_model == "some/base"
    assert card.data.library_name == "transformers"
    assert card.data.license == "mit"
    assert card.data.pipeline_tag == task
    assert {"linear-attention", kind} <= set(card.data.tags)
    assert f'{auto_class}.from_pretrained("me/it")' in card.text
    for said in (
        "pip install hf-linattn",
        "import hf_linattn",
        "hf_linattn.revert",
        get_kind(kind).title,
        "## Limits",
    ):
        assert said in card.text
    assert card.validate is not None  # the Hub's own check needs the Hub; parsing is what can be checked here


def test_every_converted_class_has_a_head() -> None:
    from hf_linattn.hub.card import HEADS

    for cls in COUNTERPARTS.values():
        assert any(cls.__name__.endswith(suffix) for suffix in HEADS), cls


def test_layers_and_settings_are_listed() -> None:
    text = render_card(converted(layers=[1]))
    assert "1 of 2 layers" in text
    assert "The other layers (0) keep softmax" in text
    assert "| num_features | `32` |" in text
    assert "| window_size | `8` |" in text
    assert "Attention dropout (0.1 in the base model)" in text
    assert "all 2 layers" in render_card(converted())


def test_metrics_are_in_text_and_header() -> None:
    facts = {"metrics": {"accuracy": 0.91234, "f1": 0.5}, "dataset": "stanfordnlp/sst2", "split": "validation"}
    text = render_card(converted(), **facts)
    card = ModelCard(text)
    assert "| accuracy | 0.9123 |" in text
    assert card.data.metrics == ["accuracy", "f1"]
    assert {(r.metric_type, r.metric_value) for r in card.data.eval_results} == {("accuracy", 0.91234), ("f1", 0.5)}
    assert card.data.eval_results[0].dataset_name == "stanfordnlp/sst2"
    assert "no quality was measured" in render_card(converted())
    assert "no quality was measured" not in text


def test_license_comes_from_the_card_of_the_base(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# Base\n")
    model = converted()
    model.config._name_or_path = str(tmp_path)
    data = ModelCard(render_card(model)).data
    assert (data.license, data.language) == ("apache-2.0", "en")
    assert data.base_model is None  # a local folder is nothing that the Hub could link to
    model.config._name_or_path = "some/base"
    assert ModelCard(render_card(model)).data.base_model == "some/base"


def test_base_model_survives_a_second_round(tmp_path: Path) -> None:
    model = converted()
    write_card(model, tmp_path, base_model="some/base")
    model.config._name_or_path = str(tmp_path)
    assert ModelCard(render_card(model)).data.base_model == "some/base"


def test_own_card_keeps_its_text(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: mit\ntags:\n- mine\n---\n# My own words\n")
    write_card(converted(), tmp_path, license="apache-2.0")
    card = ModelCard.load(path)
    assert "# My own words" in card.text
    assert "## Limits" not in card.text
    assert card.data.license == "mit"
    assert {"mine", "favor_plus"} <= set(card.data.tags)
    assert card.data.pipeline_tag == "text-classification"


def test_own_card_without_header_keeps_its_text(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# My own words\n")
    card = ModelCard.load(write_card(converted(), tmp_path))
    assert "# My own words" in card.text
    assert "linear-attention" in card.data.tags


def test_rendered_card_is_replaced(tmp_path: Path) -> None:
    write_card(converted("favor_plus"), tmp_path)
    card = ModelCard.load(write_card(converted("eva"), tmp_path))
    assert "favor_plus" not in card.data.tags
    assert "`eva`" in card.text
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_stock_model_has_no_card() -> None:
    with pytest.raises(ConfigError, match="Convert it first"):
        render_card(BY_NAME["gpt2"].build())
