"""What `scaling.py` is made of: costs of a layer, of a training step on a cluster, and checks against runs here."""
