"""Parameters and gradients that ranks hold together: of one sequence, or of different records."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from veilspan.parallel.mesh import ParallelMesh

# Its name since torch 2.13; the older one warns there.
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
_SUMMABLE = (torch.float32, torch.float64, torch.int64)


class _RowShards(ABC):
    """Parameters that FSDP2 deals by rows to the ranks of one axis of the mesh."""

    def __init__(self, mesh: ParallelMesh, axis: Literal["context", "replicate"]) -> None:
        context = axis == "context"
        self._mesh, self._axis = mesh, axis
        self._parts = mesh.context_degree if context else mesh.replicate_degree
        self._place = mesh.context_rank if context else mesh.replicate_rank
        # Torch makes the list of a mesh's ranks anew each time, which costs more than a small sum.
        self._fitting: set[DeviceMesh] = set()

    @property
    def _group(self) -> dist.ProcessGroup:
        mesh = self._mesh
        return mesh.context_group if self._axis == "context" else mesh.replicate_group

    def local(self, tensor: Tensor) -> Tensor:
        """Return the part of a parameter, or of its gradient, that this rank owns.

        Raises:
            ValueError: If the tensor is not split over the axis along its first dimension.
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
        chunk = -(-rows // self._parts)
        return min(chunk * self._place, rows) * math.prod(parameter.shape[1:])

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

    def scatter(self, parameter: Tensor, total: Tensor) -> Callable[[], Tensor]:
        """Begin to sum a clipped sum over the ranks; each keeps the part that it owns.

        Args:
            parameter: The parameter as the optimizer sees it.
            total: Sum of the whole parameter's shape on this rank; fp32, fp64 or int64.

        Returns:
            Waits for, and returns, the part owned here.

        Raises:
            ValueError: If `total` has another shape or a narrower dtype.
        """
        if total.shape != parameter.shape or total.dtype not in _SUMMABLE:
            raise ValueError(
                f"total has shape {tuple(total.shape)} and dtype {total.dtype}; a clipped sum must "
                f"have the parameter's shape {tuple(parameter.shape)} and be float32, float64 or "
                "int64."
            )
        if self._parts == 1 or not isinstance(parameter, DTensor):
            return self._whole(total)
        rows = total.shape[0]
        chunk = -(-rows // self._parts)
        if chunk * self._parts != rows:  # FSDP2 leaves the last ranks fewer rows, or none
            padding = total.new_zeros(chunk * self._parts - rows, *total.shape[1:])
            total = torch.cat([total, padding])
        mine = total.new_empty(chunk, *total.shape[1:])
        total = total.contiguous()
        # gloo has no stream to overlap with, and its asynchronous reduce-scatter is little trodden.
        later = total.is_cuda
        work = _reduce_scatter(mine, total, group=self._group, async_op=later)
        owned = max(0, min(chunk, rows - chunk * self._place))

        def arrived() -> Tensor:
            nonlocal total
            if work is not None:
                work.wait()
            total = mine  # let go of the whole sum, which had to outlive the transfer
            return mine[:owned]

        return arrived

    def agree(self, value: int) -> bool:
        """Return whether every rank gave the same value.

        Args:
            value: Any number of 63 bits; all ranks must call this together.
        """
        if self._parts == 1:
            return True
        extremes = torch.tensor([value, -value], dtype=torch.int64, device=self._mesh.device)
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self._group)
        largest, smallest = extremes.tolist()
        return largest == -smallest

    def _whole(self, total: Tensor) -> Callable[[], Tensor]:
        """Sum a parameter that every rank holds whole."""
        if self._parts > 1:
            dist.all_reduce(total, group=self._group)
        return lambda: total

    @abstractmethod
    def _refuse_replicated(self, tensor: Tensor) -> None:
        """Refuse a parameter that every rank holds whole, where that is wrong."""

    def _check_placement(self, tensor: DTensor) -> None:
        placements, split = tuple(tensor.placements), tensor.device_mesh
        if placements == (Shard(0),) and split in self._fitting:
            return
        ranks = split.mesh.flatten().tolist()
        if placements != (Shard(0),) or ranks != self._ranks():
            raise ValueError(
                f"a parameter of shape {tuple(tensor.shape)} has the placements {placements} on "
                f"the ranks {ranks}; it must be split along its first dimension "
                f"over the {self._parts} {self._axis} ranks, as shard_model does."
            )
        self._fitting.add(split)

    def _ranks(self) -> list[int]:
        if self._parts == 1:
            return [self._mesh.rank]
        return dist.get_process_group_ranks(self._group)


@final
class ContextShards(_RowShards):
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
        super().__init__(mesh, "context")

    @property
    def different_records(self) -> bool:
        """The ranks of the context axis hold parts of the same sequences."""
        return False

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
        dist.all_reduce(total, group=self._group)
        return total

    def _refuse_replicated(self, tensor: Tensor) -> None:
        if self.degree > 1:
            raise ValueError(
                f"a parameter of shape {tuple(tensor.shape)} is held whole by each of the "
                f"{self.degree} context ranks, so its gradient would be counted {self.degree} "
                "times in the norm; pass the model through shard_model before training."
            )


@final
class ReplicaShards(_RowShards):
    """Parts of a model that FSDP2 splits over ranks with different records, whole sequences each.

    Fits the `SplitModel` seam of veilspan.core by shape. FSDP2 gathers parameters as ever, but no
    gradient goes through its reduce-scatter: a record is clipped where its gradient is formed, and
    the clipped sum of each parameter is scattered here, in fp32 or int64. That serves the
    strategies `per_layer` and `bookkeeping`.

    All ranks must run the same number of micro-batches of the same size, as
    `Draw.filled_microbatches` of veilspan.core deals them.

    Args:
        mesh: The processes; `context` must be 1.

    Raises:
        ValueError: If the mesh has a context degree above 1.

    Guarantee:
        What is summed over ranks is clipped already, and is not rounded below fp32. Before each
        micro-batch and each release the ranks compare what they do; where they differ, every rank
        raises an error and nothing is released.
    """

    def __init__(self, mesh: ParallelMesh) -> None:
        if mesh.context_degree > 1:
            raise ValueError(
                f"the context degree is {mesh.context_degree}, so several ranks share a sequence; "
                "ReplicaShards needs whole sequences. Use ContextShards(mesh), or context=1."
            )
        super().__init__(mesh, "replicate")

    @property
    def different_records(self) -> bool:
        """The ranks of the replicate axis hold records of their own."""
        return True

    @property
    def degree(self) -> int:
        """One rank holds each sequence."""
        return 1

    def sum_scalars(self, values: Tensor) -> Tensor:
        """Return `values` unchanged: a record is on one rank alone."""
        return values

    def _refuse_replicated(self, tensor: Tensor) -> None:
        """Allow it: FSDP2 may be told to leave parameters whole, and their sums are equal."""
