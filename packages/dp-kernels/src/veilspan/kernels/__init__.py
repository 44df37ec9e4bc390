"""Triton kernels for per-sample norms, clipped sums and noise; PyTorch where Triton is not."""

from veilspan.kernels.kernel import TritonKernel
from veilspan.kernels.noise import TritonNoise
from veilspan.kernels.ops.accumulate import accumulate_, squared_norm
from veilspan.kernels.ops.add_noise import add_noise_
from veilspan.kernels.ops.clipped_sum import clipped_sum
from veilspan.kernels.ops.direct_norm import direct_norm
from veilspan.kernels.ops.gram_norm import gram_inner, gram_norm
from veilspan.kernels.ops.per_sample_grad import per_sample_grad
from veilspan.kernels.ops.weighted_sum import weighted_sum

__all__ = [
    "TritonKernel",
    "TritonNoise",
    "accumulate_",
    "add_noise_",
    "clipped_sum",
    "direct_norm",
    "gram_inner",
    "gram_norm",
    "per_sample_grad",
    "squared_norm",
    "weighted_sum",
]
