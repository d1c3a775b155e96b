"""Text of others in a card: shown as it is, and nothing else. Broken headers of others: one sentence."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from cases import BERT, BY_NAME
from helpers import examples
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_linattn
from hf_linattn.errors import ConfigError
from hf_linattn.hub import BrokenCardError, card_for, markup, read_card, render_card, write_card
from hf_linattn.hub.header import split_card

markdown_it = pytest.importorskip("markdown_it")
MARKDOWN = markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table")

NASTY = [
    "<script>alert(1)</script>",
    "[x](javascript:alert(1))",
    "![x](http://evil/pixel.png)",
    "`code` ``more``",
    "a | b | c",
    "one\n\n# two\n---\nlicense: evil\n---",
    "a\r\n| b | c |\r\n|---|---|",
    "x\ntags:\n- evil",
    "\\[x](y) \\` \\<b>",
    "<!-- This card is written by hf_linattn.",
    "--> <b>",
    "*a* __b__ _c_ ~~d~~ $e$ #f",
    "&lt;b&gt; &amp;",
    "{{ 7 * 7 }} {% raw %}",
    '") or print("',
    "```\n<b>\n```",
    "'] : {} !!python/object:os.system",
    "\u202egnp.exe \u2028 \x00\x1b[31m",
    "<https://evil.example>",
    "[a]: javascript:b",
    "",
]
MODEL = hf_linattn.convert(BY_NAME["bert-classifier"].build(), BERT.settings("favor_plus"), layers=[1])
PLAIN = render_card(MODEL, base_model="a/b", metrics={"f1": 0.5}, dataset="c/d", split="test", repo_id="me/it")


def elements(content: str) -> list[tuple[str, str]]:
    """What a Markdown document is made of: structure, links, HTML; not the text in it."""
    found = []
    for token in MARKDOWN.parse(split_card(content)[1]):
        found.append((token.type, token.content if token.type == "html_block" else token.tag))
        for child in token.children or []:
            if child.type not in ("text", "softbreak", "text_special"):
                found.append((child.type, str(child.attrs.get("href", ""))))
    return found


def shown(content: str) -> str:
    """The text that a reader sees."""
    tokens = [child for token in MARKDOWN.parse(split_card(content)[1]) for child in token.children or [token]]
    return "".join(token.content for token in tokens)


def check(**facts: Any) -> None:
    known = {"base_model": "a/b", "metrics": {"f1": 0.5}, "dataset": "c/d", "split": "test", "repo_id": "me/it"}
    content = render_card(MODEL, **{**known, **facts})
    expected = elements(PLAIN)
    if "base_model" in facts:  # shown without a link
        expected = [one for one in expected if one != ("link_open", "https://huggingface.co/a/b")]
        expected.remove(("link_close", ""))
    assert elements(content) == expected
    header = split_card(content)[0]
    assert set(header) <= set(split_card(PLAIN)[0])
    assert (header["library_name"], header.get("license")) == ("transformers", None)
    assert header["tags"] == ["linear-attention", "hf_linattn", "favor_plus"]
    assert ModelCard(content).data.to_dict() == header or "eval_results" in ModelCard(content).data.to_dict()


@pytest.mark.parametrize("text", NASTY, ids=ascii)
@pytest.mark.parametrize("field", ["repo_id", "base_model", "metrics", "dataset", "split"])
def test_every_fact_of_a_card(field: str, text: str) -> None:
    if not text:
        text = "<b>"
    check(**{field: {text: 0.5} if field == "metrics" else text})


@settings(max_examples=examples(60))
@given(
    st.text(alphabet="ab \n\r\t`|\\<>[]()!*_#-+:.&;'\"{}%$~=0", max_size=24), st.sampled_from(["dataset", "repo_id"])
)
def test_any_text_in_a_card(text: str, field: str) -> None:
    check(**{field: f"x{text}x"})


@settings(max_examples=examples(150))
@given(st.text(alphabet='ab \n`|\\<>[]()!*_#-:.&;"~$', max_size=24))
def test_markup_shows_what_it_is_given(text: str) -> None:
    flat = " ".join(text.split())
    rows = ["a", "-", markup.text(text), markup.code(text)]
    table = MARKDOWN.parse("| a | b |\n|---|---|\n| {2} | {3} |\n".format(*rows))
    cells = ["".join(c.content for c in t.children) for t in table if t.type == "inline"][2:]
    assert [" ".join(cell.split()) for cell in cells[:1]] == [flat]
    assert len(cells) == 2
    assert {child.type for t in table for child in t.children or []} <= {"text", "text_special", "code_inline"}
    if "\\" not in flat:  # before a pipe, tables read it in their own way
        assert " ".join(cells[1].split()) == flat


def test_names_of_classes_and_settings_from_a_config() -> None:
    model = hf_linattn.convert(BY_NAME["bert-classifier"].build(), BERT.settings("favor_plus"), layers=[1])
    model.__class__ = type("Odd<b>|`Model", (type(model),), {})
    model.config._name_or_path = "</a><img src=x onerror=alert(1)>"
    model.config.__dict__["max_position_embeddings"] = "<b>|"
    content = render_card(model)
    assert not [one for one in elements(content) if one[0].startswith("html") and "hf_linattn" not in one[1]]
    assert "Odd<b>|`Model" in shown(content)
    assert split_card(content)[0].get("base_model") is None


def test_several_base_models() -> None:
    content = render_card(MODEL, base_model=["a/b", "c/d"])
    assert split_card(content)[0]["base_model"] == ["a/b", "c/d"]
    assert ("link_open", "https://huggingface.co/c/d") in elements(content)


BROKEN = {
    "not YAML": "---\nlicense: [mit\n---\n# Mine\n",
    "no end": "---\nlicense: mit\n# Mine\n",
    "a list": "---\n- mit\n---\n# Mine\n",
    "a word": "---\nmit\n---\n# Mine\n",
    "a tab": "---\na:\n\t- b\n---\n# Mine\n",
    "a date that is none": "---\na: 2024-99-99\n---\n# Mine\n",
    "an object": "---\na: !!python/object/apply:os.system ['true']\n---\n# Mine\n",
    "deep": "---\na: " + "[" * 1500 + "\n---\n# Mine\n",
    "numbers for names": "---\n1: a\n---\n# Mine\n",
    "latin-1": b"---\nlicense: mit\n---\n# Caf\xe9\n",
}


def put(content: str | bytes, path: Path) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_header_is_one_sentence(broken: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = put(BROKEN[broken], tmp_path / "README.md")
    with pytest.raises(BrokenCardError) as caught:
        read_card(path)
    assert isinstance(caught.value, ConfigError)
    said = str(caught.value)
    assert said.startswith(repr(str(path)))
    assert "\n" not in said
    assert len(said) < 300
    # Of the base model: nothing is carried over. In the folder: it stays as it is. Both with a warning.
    before = path.read_bytes()
    model = hf_linattn.convert(BERT.build(), BERT.settings("favor_plus"))
    model.config._name_or_path = str(tmp_path)
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        assert "license" not in split_card(render_card(model))[0]
        write_card(MODEL, tmp_path)
    assert [said in record.getMessage() for record in caplog.records] == [True, True]
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("license", {"a": "b"}),
        ("license", ["mit", 3]),
        ("license", 7),
        ("license", "<script>"),
        ("license", "mit\ntags: [evil]"),
        ("language", {"en": 1}),
        ("language", [["en"]]),
        ("language", True),
        ("language", "[x](y)"),
    ],
)
def test_wrong_types_of_the_base_are_left_out(
    field: str, value: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(f"---\n{yaml.safe_dump({field: value, 'pipeline_tag': 'x'})}---\n# Base\n", tmp_path / "README.md")
    model = hf_linattn.convert(BERT.build(), BERT.settings("favor_plus"))
    model.config._name_or_path = str(tmp_path)
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        header, _ = split_card(render_card(model))
    assert field not in header
    assert [record.getMessage() for record in caplog.records if f"`{field}`" in record.getMessage()]


@pytest.mark.parametrize(("value", "expected"), [("no", "no"), ("[en, no]", ["en", "no"]), ("zh-Hans", "zh-Hans")])
def test_languages_of_the_base(value: str, expected: Any, tmp_path: Path) -> None:
    """`no` is Norwegian, and False to YAML."""
    put(f"---\nlanguage: {value}\nlicense: [mit, apache-2.0]\n---\n", tmp_path / "README.md")
    model = hf_linattn.convert(BERT.build(), BERT.settings("favor_plus"))
    model.config._name_or_path = str(tmp_path)
    header, _ = split_card(render_card(model))
    assert header["language"] == expected
    assert header["license"] == ["mit", "apache-2.0"]


@pytest.mark.parametrize(
    ("own", "tags"), [("tags: mine", ["mine"]), ("tags: [mine, favor_plus]", ["mine", "favor_plus"]), ("a: 1", [])]
)
def test_own_header_keeps_everything(own: str, tags: list[str]) -> None:
    content = f"---\nlicense: mit\n{own}\nmodel-index: broken\nodd: {{b: [1, null]}}\n---\n# Mine\n\n---\nend\n"
    header, body = split_card(card_for(MODEL, content))
    assert body == "# Mine\n\n---\nend\n"
    assert (header["license"], header["model-index"], header["odd"]) == ("mit", "broken", {"b": [1, None]})
    assert header["tags"][: len(tags)] == tags
    assert {"linear-attention", "favor_plus"} <= set(header["tags"])
    with pytest.raises(BrokenCardError, match="`tags` in its header must be a list"):
        card_for(MODEL, "---\ntags: {a: b}\n---\n")


def test_a_link_is_replaced_and_not_read(tmp_path: Path) -> None:
    secret = put("secret", tmp_path / "secret")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").symlink_to(secret)
    path = write_card(MODEL, tmp_path / "out")
    assert "secret" not in path.read_text()
    assert not path.is_symlink()
    assert secret.read_text() == "secret"
