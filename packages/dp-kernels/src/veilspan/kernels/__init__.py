"""Triton kernels for per-sample norms, clipped sums and noise; PyTorch where Triton is not."""

from veilspan.kernels.kernel import TritonKernel
from veilspan.kernels.noise import TritonNoise
from veilspan.kernels.ops.accumulate import accumulate_, squared_norm
from veilspan.kernels.ops.add_noise import add_noise_
from veilspan.kernels.ops.affine_norm import layer_norm_backward, rms_norm_backward
from veilspan.kernels.ops.bias_norm import bias_norm
from veilspan.kernels.ops.clipped_sum import clipped_sum
from veilspan.kernels.ops.cross_entropy import cross_entropy_
from veilspan.kernels.ops.direct_norm import direct_norm
from veilspan.kernels.ops.embedding_inner import embedding_inner
from veilspan.kernels.ops.embedding_norm import embedding_norm
from veilspan.kernels.ops.embedding_sum import embedding_sum_
from veilspan.kernels.ops.fused_head import HeadResult, fused_head
from veilspan.kernels.ops.gram_norm import gram_inner, gram_norm
from veilspan.kernels.ops.layerwise_clip import layerwise_clip_
from veilspan.kernels.ops.per_sample_grad import per_sample_grad
from veilspan.kernels.ops.sketch_norm import Probes, sketch_norm
from veilspan.kernels.ops.weighted_sum import weighted_sum

__all__ = [
    "HeadResult",
    "Probes",
    "TritonKernel",
    "TritonNoise",
    "accumulate_",
    "add_noise_",
    "bias_norm",
    "clipped_sum",
    "cross_entropy_",
    "direct_norm",
    "embedding_inner",
    "embedding_norm",
    "embedding_sum_",
    "fused_head",
    "gram_inner",
    "gram_norm",
    "layer_norm_backward",
    "layerwise_clip_",
    "per_sample_grad",
    "rms_norm_backward",
    "sketch_norm",
    "squared_norm",
    "weighted_sum",
]
