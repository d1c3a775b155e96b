"""The command `hf-linattn`: it reads the command line, the work is done elsewhere."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the installed command."""
    try:
        from .app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "psutil", "click"):
            raise
        sys.exit(f"hf-linattn needs {error.name}, which is not installed: pip install 'hf-linattn[cli]'")
    app()
