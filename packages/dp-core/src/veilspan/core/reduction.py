"""Defaults of the distributed seams: one process that holds every sample and every parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from veilspan.core.errors import UnsupportedModelError
from veilspan.core.noise import GaussianNoise, new_key
from veilspan.core.protocols import GradientReduction, SequenceShards


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


def own_noise(
    reduction: GradientReduction | None,
    noise_multiplier: float,
    shards: SequenceShards,
    parameters: Mapping[str, nn.Parameter],
) -> GaussianNoise:
    """Return noise under a fresh key, the same on ranks that hold a sequence together.

    Raises:
        ValueError: If replicas would draw noise of their own: each would release the same sum once
            more, and what their models have in common has less noise than is counted.
    """
    ranks = processes()
    if ranks > 1 and reduction is not None and noise_multiplier > 0:
        raise ValueError(
            f"noise is None, so each of {ranks} processes would draw a key of its own: replicas, "
            "and adaptive thresholds, would part. Draw new_key() on one process, send it to the "
            "others (veilspan.parallel.broadcast_bytes), and pass noise=GaussianNoise(key)."
        )
    return GaussianNoise(common_key(shards, next(iter(parameters.values())).device))


def common_key(shards: SequenceShards, device: torch.device) -> bytes:
    """Return a fresh key that the ranks of one sequence share and no others have."""
    own = torch.tensor(list(new_key()), dtype=torch.float64, device=device)
    return bytes(int(value) % 256 for value in shards.sum_scalars(own).tolist())


def processes() -> int:
    """Return the number of processes that torch.distributed knows of; 1 before it is started."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
