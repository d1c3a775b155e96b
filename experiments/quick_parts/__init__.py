"""What `experiments/quick.py` is made of: the figures, the process that measures them, turns, arithmetic, checkouts."""
