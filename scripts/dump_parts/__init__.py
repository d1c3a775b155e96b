"""Parts of `scripts/dump_outputs.py`."""
