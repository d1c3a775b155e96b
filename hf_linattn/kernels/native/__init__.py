"""C kernels for CPUs: how they are compiled, and what they share."""
