"""Changing a saved checkpoint by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def edit_config(folder: Path, **changes: Any) -> None:
    """Change fields of config.json; `None` removes one."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for name, value in changes.items():
        if value is None:
            values.pop(name, None)
        else:
            values[name] = value
    path.write_text(json.dumps(values))
