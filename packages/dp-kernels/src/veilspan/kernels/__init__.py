"""Triton kernels for per-sample norms, clipped sums and noise; PyTorch where Triton is not."""

from veilspan.kernels.ops.accumulate import accumulate_, squared_norm
from veilspan.kernels.ops.affine_norm import layer_norm_backward, rms_norm_backward
from veilspan.kernels.ops.bias_norm import bias_norm

__all__ = [
    "accumulate_",
    "bias_norm",
    "layer_norm_backward",
    "rms_norm_backward",
    "squared_norm",
]
