"""What `experiments/quick.py` is made of: figures, the process that measures them, turns, arithmetic, checkouts."""
