"""What `scripts/gpu_check.py` does, one file for each kind of part."""
