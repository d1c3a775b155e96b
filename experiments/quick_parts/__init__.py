"""What `experiments/quick.py` is made of: the figures, and the process that measures them."""
