"""FAVOR+, FAVOR# and generalised kernels: features, statistics, variance."""
