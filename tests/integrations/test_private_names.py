"""Private names of Transformers are used in a few files only, and not elsewhere."""

from __future__ import annotations

import ast
from pathlib import Path

import hf_linattn

PACKAGE = Path(hf_linattn.__file__).parent
# Where Transformers' modules and private names may be used. `families.py` holds the names within the architectures.
FILES = {"integrations/seams.py", "integrations/model_seams.py", "integrations/probes.py"}
# Public, but ours alone to reach through these files: what they do has changed, or may.
OURS = {"AttentionInterface", "AttentionMaskInterface", "EncoderDecoderCache", "cache_utils", "initialization"}
PRIVATE = {
    "_attn_implementation",
    "_attn_implementation_internal",
    "_can_record_outputs",
    "_extra_content",
    "_global_mapping",
    "_is_hf_initialized",
    "_model_mapping",
    "_reverse_config_mapping",
    "cache_params",
    "past_key_values",
}


def leaks(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers."):
            names = [node.module or ""]
        elif isinstance(node, ast.ImportFrom) and node.module == "transformers":
            names = [alias.name for alias in node.names if alias.name in OURS or not alias.name[0].isupper()]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("transformers.")]
        elif isinstance(node, ast.Attribute):
            names = [node.attr] if node.attr in PRIVATE else []
        elif isinstance(node, ast.keyword):
            names = [node.arg] if node.arg in PRIVATE else []
        elif isinstance(node, ast.Constant):
            names = [node.value] if isinstance(node.value, str) and node.value in PRIVATE else []
        found += [f"{path.relative_to(PACKAGE)}:{node.lineno} uses {name}" for name in names]  # type: ignore[attr-defined]
    return found


def test_the_seams_are_in_a_few_files() -> None:
    files = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
    assert set(files) >= FILES
    assert all(leaks(files[name]) for name in FILES), "the reader finds nothing"
    found = [leak for name, path in files.items() if name not in FILES for leak in leaks(path)]
    assert not found, "\n".join(found)
