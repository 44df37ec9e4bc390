"""Defaults of the distributed seams: one process that holds every sample and every parameter."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


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
        """Return `tensor` unchanged."""
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
