"""The one sum over replicas of the model per logical batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from veilspan.parallel.mesh import ParallelMesh

_SUMMABLE = (torch.float32, torch.float64, torch.int64)


class ReplicaReduction:
    """Sum of clipped sums over the `replicate` axis.

    Fits the `GradientReduction` seam of veilspan.core by shape. Replicas meet nowhere else, so
    their micro-batches may differ in number, and a replica whose share of the draw is empty waits
    here only.

    Args:
        mesh: The processes.
        bucket_bytes: Tensors are sent together in messages of about this size.

    Raises:
        ValueError: If `bucket_bytes` is not positive.

    Guarantee:
        Plain sums, no mean: the result does not depend on the number of replicas, and is bitwise
        the same on all of them.
    """

    def __init__(self, mesh: ParallelMesh, *, bucket_bytes: int = 64 * 2**20) -> None:
        if bucket_bytes < 1:
            raise ValueError(f"bucket_bytes is {bucket_bytes}; it must be at least 1.")
        self._mesh = mesh
        self._bucket_bytes = bucket_bytes

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor in place over the replicas; once per logical batch.

        Args:
            tensors: Local tensors, fp32, fp64 or int64, the same shapes in the same order on every
                replica.

        Raises:
            ValueError: If a tensor is of another dtype or is a DTensor.
        """
        for tensor in tensors:
            if isinstance(tensor, DTensor) or tensor.dtype not in _SUMMABLE:
                raise ValueError(
                    f"a {type(tensor).__name__} of {tensor.dtype} cannot be summed over replicas; "
                    "pass local tensors of torch.float32, torch.float64 or torch.int64."
                )
        if self._mesh.replicate_degree == 1:
            return
        for bucket in self._buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat, group=self._mesh.replicate_group)
            parts = flat.split([tensor.numel() for tensor in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view(tensor.shape))

    def _buckets(self, tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Group neighbours of one dtype until a bucket is full."""
        bucket: list[Tensor] = []
        size = 0
        for tensor in tensors:
            if bucket and (size >= self._bucket_bytes or tensor.dtype != bucket[0].dtype):
                yield bucket
                bucket, size = [], 0
            bucket.append(tensor)
            size += tensor.numel() * tensor.element_size()
        if bucket:
            yield bucket
