"""Parameters and per-sample gradients that the ranks of the context axis hold together."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from veilspan.parallel.mesh import ParallelMesh


class ContextShards:
    """Who holds the rest of each sequence and of each parameter.

    Fits the `SequenceShards` seam of veilspan.core by shape. With one sample per micro-batch, the
    sum over the context axis that FSDP2 makes in its reduce-scatter *is* that sample's gradient,
    and each rank holds a disjoint part of it.

    Args:
        mesh: The processes.

    Guarantee:
        Every element of a parameter is owned by exactly one rank of the context axis, so the sum of
        the ranks' squared local norms is the squared norm of the whole gradient. A parameter that
        every rank holds whole would be counted N times, and is refused.
    """

    def __init__(self, mesh: ParallelMesh) -> None:
        self._mesh = mesh

    @property
    def degree(self) -> int:
        """Number of ranks that hold one sequence together."""
        return self._mesh.context_degree

    def sum_scalars(self, values: Tensor) -> Tensor:
        """Return `values` summed over the context axis, in the same shape and dtype.

        Args:
            values: Any shape; fp64, so that the order of the ranks does not matter.

        Raises:
            ValueError: If `values` is not fp64.
        """
        if values.dtype != torch.float64:
            raise ValueError(f"values are {values.dtype}; sums of squares must be torch.float64.")
        if self.degree == 1:
            return values
        total = values.clone()
        dist.all_reduce(total, group=self._mesh.context_group)
        return total

    def local(self, tensor: Tensor) -> Tensor:
        """Return the part of a parameter, or of its gradient, that this rank owns.

        Raises:
            ValueError: If the tensor is not split over the context axis along its first dimension.
        """
        if not isinstance(tensor, DTensor):
            self._refuse_replicated(tensor)
            return tensor
        self._check_placement(tensor)
        return tensor.to_local()

    def offset(self, parameter: Tensor) -> int:
        """Return the flat index, in the whole parameter, of the first element owned here.

        Rows are dealt in chunks of ⌈rows/N⌉, so the last ranks may own fewer or none; the offset of
        a rank that owns none is the number of elements.
        """
        if not isinstance(parameter, DTensor):
            self._refuse_replicated(parameter)
            return 0
        self._check_placement(parameter)
        rows = parameter.shape[0]
        chunk = -(-rows // self.degree)
        return min(chunk * self._mesh.context_rank, rows) * math.prod(parameter.shape[1:])

    def restore(self, parameter: Tensor, local: Tensor) -> Tensor:
        """Return `local` in the form that `parameter.grad` must have; the inverse of `local`.

        Args:
            parameter: The parameter as the optimizer sees it.
            local: Values of the part owned here; any floating dtype.

        Returns:
            A tensor of the parameter's type, shape and dtype.

        Raises:
            ValueError: If `local` has not the shape of the part owned here.
        """
        mine = self.local(parameter)
        if local.shape != mine.shape:
            raise ValueError(
                f"local has shape {tuple(local.shape)}, but the part owned here has shape "
                f"{tuple(mine.shape)} of a parameter of shape {tuple(parameter.shape)}."
            )
        local = local.to(parameter.dtype)
        if not isinstance(parameter, DTensor):
            return local
        return DTensor.from_local(
            local,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )

    def _refuse_replicated(self, tensor: Tensor) -> None:
        if self.degree > 1:
            raise ValueError(
                f"a parameter of shape {tuple(tensor.shape)} is held whole by each of the "
                f"{self.degree} context ranks, so its gradient would be counted {self.degree} "
                "times in the norm; pass the model through shard_model before training."
            )

    def _check_placement(self, tensor: DTensor) -> None:
        placements = tuple(tensor.placements)
        ranks = tensor.device_mesh.mesh.flatten().tolist()
        if placements != (Shard(0),) or ranks != self._ranks():
            raise ValueError(
                f"a parameter of shape {tuple(tensor.shape)} has the placements {placements} on "
                f"the ranks {ranks}; it must be split along its first dimension "
                f"over the {self.degree} context ranks, as shard_model does."
            )

    def _ranks(self) -> list[int]:
        if self.degree == 1:
            return [self._mesh.rank]
        return dist.get_process_group_ranks(self._mesh.context_group)
