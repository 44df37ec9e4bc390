"""Triton kernels for per-sample norms, clipped sums and noise; PyTorch where Triton is not."""

from veilspan.kernels.noise import TritonNoise
from veilspan.kernels.ops.accumulate import accumulate_, squared_norm
from veilspan.kernels.ops.add_noise import add_noise_

__all__ = ["TritonNoise", "accumulate_", "add_noise_", "squared_norm"]
