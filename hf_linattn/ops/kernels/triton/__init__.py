"""Triton kernels. Nothing outside this package imports Triton, and nothing imports this package until it is needed."""
