"""Which process holds which part of the sequence, on which replica of the model."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

AXES = ("replicate", "context")
"""Names of the mesh axes, outermost first: neighbours on `context` are neighbouring ranks."""

_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


@dataclass(frozen=True, kw_only=True)
class ParallelMesh:
    """A `replicate` × `context` grid of processes.

    The processes of one row hold one sequence together (`context`); the rows are copies of the
    model that work on different records (`replicate`). Build it with `build_mesh`.

    Attributes:
        replicate_degree: Number of copies of the model.
        context_degree: Number of processes that hold one sequence together.
        replicate_rank: Index of this process's copy, `0 … replicate_degree - 1`.
        context_rank: Index of this process's part of the sequence, `0 … context_degree - 1`.
        device_type: `"cpu"` or `"cuda"`.
        device_mesh: The grid as torch sees it; None in a single process without process groups.
    """

    replicate_degree: int
    context_degree: int
    replicate_rank: int
    context_rank: int
    device_type: str
    device_mesh: DeviceMesh | None

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.replicate_degree * self.context_degree

    @property
    def rank(self) -> int:
        """Index of this process, `0 … world_size - 1`."""
        return self.replicate_rank * self.context_degree + self.context_rank

    @property
    def device(self) -> torch.device:
        """Device of this process."""
        if self.device_type == "cuda":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device(self.device_type)

    @property
    def context_mesh(self) -> DeviceMesh:
        """One-dimensional mesh of the processes that hold one sequence together."""
        return self._grid()["context"]

    @property
    def replicate_mesh(self) -> DeviceMesh:
        """One-dimensional mesh of the copies of the model."""
        return self._grid()["replicate"]

    @property
    def context_group(self) -> dist.ProcessGroup:
        """Process group of the `context` axis."""
        return self._grid().get_group("context")

    @property
    def replicate_group(self) -> dist.ProcessGroup:
        """Process group of the `replicate` axis."""
        return self._grid().get_group("replicate")

    def _grid(self) -> DeviceMesh:
        if self.device_mesh is None:
            raise ValueError(
                "this mesh has one process and no process groups; ask for a group only where "
                "replicate_degree or context_degree is above 1."
            )
        return self.device_mesh


def build_mesh(
    *,
    replicate: int = 1,
    context: int = 1,
    device_type: str = "cpu",
    timeout_s: float = 600.0,
) -> ParallelMesh:
    """Arrange the processes of this run in a `replicate` × `context` grid.

    With one process nothing is started and every collective of this package becomes a no-op, so a
    program needs one code path only. With several (`torchrun`), process groups are started here
    unless the program has already done it.

    Args:
        replicate: Number of copies of the model, each on records of its own.
        context: Number of processes that hold one sequence together.
        device_type: `"cpu"` (gloo) or `"cuda"` (NCCL, with gloo for tensors on the CPU).
        timeout_s: Seconds after which a collective that a peer never joins fails.

    Returns:
        The grid, seen from this process.

    Raises:
        ValueError: If a degree is not positive, the device type unknown, or `replicate · context`
            is not the number of processes.

    Examples:
        >>> mesh = build_mesh()
        >>> mesh.world_size, mesh.context_rank
        (1, 0)
    """
    for name, degree in (("replicate", replicate), ("context", context)):
        if degree < 1:
            raise ValueError(f"{name} is {degree}; it must be at least 1.")
    if device_type not in _BACKENDS:
        raise ValueError(f"device_type is {device_type!r}; it must be one of {sorted(_BACKENDS)}.")
    if not (timeout_s > 0):
        raise ValueError(f"timeout_s is {timeout_s}; it must be a positive number of seconds.")
    _start_processes(replicate * context, device_type, timeout_s)
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if replicate * context != world_size:
        raise ValueError(
            f"replicate · context = {replicate} · {context} = {replicate * context}, but this run "
            f"has {world_size} process(es); make the product equal to torchrun's --nproc-per-node "
            "times --nnodes."
        )
    if not dist.is_initialized():
        return ParallelMesh(
            replicate_degree=1,
            context_degree=1,
            replicate_rank=0,
            context_rank=0,
            device_type=device_type,
            device_mesh=None,
        )
    grid = init_device_mesh(device_type, (replicate, context), mesh_dim_names=AXES)
    return ParallelMesh(
        replicate_degree=replicate,
        context_degree=context,
        replicate_rank=grid.get_local_rank("replicate"),
        context_rank=grid.get_local_rank("context"),
        device_type=device_type,
        device_mesh=grid,
    )


def _start_processes(processes: int, device_type: str, timeout_s: float) -> None:
    """Join the process group that the launcher describes; do nothing in a lone process."""
    # A lone degree under torchrun still joins: otherwise each of its processes would take itself
    # for the whole run, and they would train, and account, side by side.
    if dist.is_initialized() or not (processes > 1 or dist.is_torchelastic_launched()):
        return
    try:
        dist.init_process_group(_BACKENDS[device_type], timeout=timedelta(seconds=timeout_s))
    except ValueError as error:
        raise ValueError(
            f"replicate · context is {processes}, but this process was not started as one of "
            f"several ({error}); start it with torchrun --nproc-per-node {processes}."
        ) from error
