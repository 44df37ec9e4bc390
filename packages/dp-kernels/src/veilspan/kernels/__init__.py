"""Triton kernels for per-sample norms, clipped sums and noise; PyTorch where Triton is not."""

from veilspan.kernels.ops.accumulate import accumulate_, squared_norm

__all__ = ["accumulate_", "squared_norm"]
