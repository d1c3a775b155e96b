"""The kernels in plain torch: what runs on a CPU, and what the Triton kernels are compared with."""
