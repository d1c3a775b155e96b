"""The registry of kinds: names, near misses, taken names, lazy import."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest

import hf_linattn
from hf_linattn.errors import ConfigError
from hf_linattn.modules import registry
from hf_linattn.modules.base import LinearAttention
from hf_linattn.modules.config import AttentionConfig
from hf_linattn.modules.registry import get_kind, list_kinds, register_kind


@pytest.fixture(autouse=True)
def _own_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in registry.BUILTIN_KINDS:
        get_kind(name)
    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))
    monkeypatch.setattr(registry, "_LISTENERS", [])


def test_the_four_kinds() -> None:
    assert list_kinds() == ["eva", "favor_plus", "favor_sharp", "lara"]
    for name in list_kinds():
        kind = get_kind(name)
        assert kind.name == kind.config_cls.kind == kind.module_cls.kind == name
        assert issubclass(kind.config_cls, AttentionConfig)
        assert issubclass(kind.module_cls, LinearAttention)
        assert kind.paper.startswith("arXiv:")
        assert kind.config_cls.__doc__
        assert kind.module_cls.__doc__


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("favour_plus", "favor_plus"),
        ("FAVOR-SHARP", "favor_sharp"),
        ("lora", "lara"),
        ("performer", None),
        (None, None),
    ],
)
def test_unknown_kinds(wrong: str, meant: str | None) -> None:
    with pytest.raises(ConfigError, match="registered kinds: .*'eva', 'favor_plus', 'favor_sharp', 'lara'") as error:
        get_kind(wrong)
    assert repr(wrong) in str(error.value)
    assert ("Did you mean" in str(error.value)) is (meant is not None)
    assert meant is None or f"Did you mean {meant!r}?" in str(error.value)


def test_a_taken_name_is_refused_and_the_first_stays() -> None:
    first = get_kind("lara")
    register_kind(first)  # importing a module twice is no conflict
    register_kind(dataclasses.replace(first, title="LARA again"))
    with pytest.raises(ConfigError, match="'lara' is already registered by .*LaraAttention"):
        register_kind(dataclasses.replace(first, module_cls=get_kind("eva").module_cls))
    assert get_kind("lara").module_cls is first.module_cls


def test_a_new_kind_is_listed_and_found() -> None:
    class MyAttention(LinearAttention):
        kind = "mine"

    register_kind(dataclasses.replace(get_kind("eva"), name="mine", module_cls=MyAttention))
    assert "mine" in list_kinds()
    assert get_kind("mine").module_cls is MyAttention


def test_kinds_are_imported_on_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    present, imported = dict(registry._KINDS), []

    def import_module(path: str) -> None:
        imported.append(path)
        register_kind(present[path.rpartition(".")[2]])

    monkeypatch.setattr(registry, "_KINDS", {})
    monkeypatch.setattr(registry.importlib, "import_module", import_module)
    assert len(list_kinds()) == 4
    assert imported == []
    assert get_kind("eva") is get_kind("eva") is present["eva"]
    assert imported == ["hf_linattn.modules.kinds.eva"]


def test_other_files_do_not_know_kinds_by_name() -> None:
    """What others want to know of a kind is on its record. (The canary's own model has a kind of its choice.)"""
    package = Path(hf_linattn.__file__).parent
    found = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value in registry.BUILTIN_KINDS:
                found.add(path.relative_to(package).as_posix())
    kinds = {f"modules/kinds/{name}.py" for name in registry.BUILTIN_KINDS}
    assert found - kinds == {"modules/registry.py", "integrations/family_probes.py"}
