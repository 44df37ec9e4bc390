"""Triton kernels for per-sample norms, clipped sums and noise; PyTorch where Triton is not."""

from veilspan.kernels.ops.accumulate import accumulate_, squared_norm
from veilspan.kernels.ops.affine_norm import layer_norm_backward, rms_norm_backward
from veilspan.kernels.ops.bias_norm import bias_norm
from veilspan.kernels.ops.embedding_norm import embedding_norm
from veilspan.kernels.ops.embedding_sum import embedding_sum_

__all__ = [
    "accumulate_",
    "bias_norm",
    "embedding_norm",
    "embedding_sum_",
    "layer_norm_backward",
    "rms_norm_backward",
    "squared_norm",
]
