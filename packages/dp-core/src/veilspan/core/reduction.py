"""Defaults of the distributed seams: one process that holds every sample and every parameter."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.distributed.tensor import DTensor

from veilspan.core.errors import UnsupportedModelError


class LocalShards:
    """`SequenceShards` of a process that holds whole sequences and whole parameters."""

    @property
    def degree(self) -> int:
        """One rank holds each sequence."""
        return 1

    def sum_scalars(self, values: Tensor) -> Tensor:
        """Return `values` unchanged."""
        return values

    def local(self, tensor: Tensor) -> Tensor:
        """Return `tensor` unchanged.

        Raises:
            UnsupportedModelError: If the tensor is split over ranks.
        """
        if isinstance(tensor, DTensor):
            raise UnsupportedModelError(
                f"A parameter of shape {tuple(tensor.shape)} is split over ranks (a DTensor), but "
                "PrivateStep was told of no shards, so each rank would see a part of the norm. "
                "Pass shards=, such as veilspan.parallel.ContextShards(mesh)."
            )
        return tensor

    def offset(self, parameter: Tensor) -> int:
        """Return 0: every parameter begins here."""
        return 0

    def restore(self, parameter: Tensor, local: Tensor) -> Tensor:
        """Return `local` unchanged."""
        return local


class NoReduction:
    """`GradientReduction` of a single replica."""

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Leave `tensors` unchanged."""
