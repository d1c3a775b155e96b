"""The header of a model card: reading those of others, which may be broken, and writing one."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.utils import yaml_dump

from ..errors import ConfigError

logger = logging.getLogger(__name__)

_BLOCK = re.compile(r"\A\ufeff?\s*---[ \t]*\n(?P<header>(?:.*?\n)??)---[ \t]*(?:\n|\Z)", re.DOTALL)
_LICENSE = re.compile(r"[\w.+-]{1,64}", re.ASCII)
_LANGUAGE = re.compile(r"[\w-]{1,32}", re.ASCII)
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)


class BrokenCardError(ConfigError):
    """A README.md whose header cannot be read."""


def read_card(path: Path) -> str:
    """The text of a card. Raises `BrokenCardError`, in one sentence, if it or its header cannot be read."""
    try:
        content = path.read_text(encoding="utf-8")
        split_card(content)
    except OSError as error:
        raise BrokenCardError(f"{str(path)!r} cannot be read ({error.strerror or error}).") from None
    except ValueError as error:  # also what UTF-8 cannot decode
        raise BrokenCardError(f"{str(path)!r} cannot be used as a model card: {_reason(error)}.") from None
    return content


def _reason(error: ValueError) -> str:
    return "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error).rstrip(".")


def split_card(content: str) -> tuple[dict[str, Any], str]:
    """The fields of the header (none without a header) and the text below it. Raises `BrokenCardError`."""
    found = _BLOCK.match(content)
    if found is None:
        if re.match(r"\ufeff?\s*---[ \t]*\n", content):
            raise BrokenCardError("its header has no closing line '---'")
        return {}, content
    try:
        header = yaml.safe_load(found["header"])
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" (line {mark.line + 2})"
        what = getattr(error, "problem", None) or type(error).__name__
        raise BrokenCardError(f"its header is not valid YAML{where}: {what}") from None
    if header is None:
        header = {}
    if not isinstance(header, dict) or not all(isinstance(name, str) for name in header):
        raise BrokenCardError("its header must be a list of 'name: value'")
    return header, content[found.end() :]


def join_card(header: dict[str, Any], body: str) -> str:
    """The whole card."""
    return f"---\n{yaml_dump(header, sort_keys=False)}---\n{body}"


def add_tags(content: str, tags: Sequence[str]) -> str:
    """The card with more tags. Raises `BrokenCardError`."""
    if not tags:
        return content
    header, body = split_card(content)
    present = header.get("tags") or []
    present = [present] if isinstance(present, str) else present
    if not isinstance(present, list):
        raise BrokenCardError(f"`tags` in its header must be a list; got {present!r}")
    header["tags"] = present + [tag for tag in tags if tag not in present]
    return join_card(header, body)


def source_metadata(source: str, mark: str) -> dict[str, Any]:
    """License, language and (of a card with `mark`) base model from the card of what was loaded, if it is here.

    What is broken or of the wrong type is left out, with a warning: no upload should fail on somebody else's card.
    """
    path = Path(source) / "README.md" if source else None
    if path is not None and not _is_file(path):
        cached = try_to_load_from_cache(source, "README.md") if is_hub_name(source) else None
        path = Path(cached) if isinstance(cached, str) else None
    if path is None:
        return {}
    try:
        content = read_card(path)
    except BrokenCardError as error:
        logger.warning("License and language of the base model are not in the card: %s", error)
        return {}
    header, body = split_card(content)
    wanted = {"license": _LICENSE.fullmatch, "language": _LANGUAGE.fullmatch}
    if mark in body:  # a converted model, trained on: it still comes from the same base
        wanted["base_model"] = _HUB_NAME.fullmatch
    found = {}
    for name, fits in wanted.items():
        value = header.get(name)
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        if name == "language":
            values = ["no" if one is False else one for one in values]  # Norwegian is False to YAML
        if all(isinstance(one, str) and fits(one) for one in values):
            found[name] = values if isinstance(value, list) else values[0]
        else:
            logger.warning("`%s` of %r is not in the card: %s there is %r.", name, source, path.name, value)
    return found


def is_hub_name(name: str) -> bool:
    """Whether this can be the name of a repository, and is not that of a local file or folder."""
    return bool(_HUB_NAME.fullmatch(name)) and not _is_file(Path(name)) and not Path(name).exists()


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name no file can have
        return False
