"""Triton kernels for per-sample norms, clipped sums and noise; PyTorch where Triton is not."""

from veilspan.kernels.ops.accumulate import accumulate_, squared_norm
from veilspan.kernels.ops.affine_norm import layer_norm_backward, rms_norm_backward
from veilspan.kernels.ops.bias_norm import bias_norm
from veilspan.kernels.ops.cross_entropy import cross_entropy_
from veilspan.kernels.ops.embedding_inner import embedding_inner
from veilspan.kernels.ops.embedding_norm import embedding_norm
from veilspan.kernels.ops.embedding_sum import embedding_sum_
from veilspan.kernels.ops.fused_head import HeadResult, fused_head

__all__ = [
    "HeadResult",
    "accumulate_",
    "bias_norm",
    "cross_entropy_",
    "embedding_inner",
    "embedding_norm",
    "embedding_sum_",
    "fused_head",
    "layer_norm_backward",
    "rms_norm_backward",
    "squared_norm",
]
