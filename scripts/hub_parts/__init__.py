"""What `scripts/hub_check.py` does: the models, the parts of a check, and the record of a run."""
