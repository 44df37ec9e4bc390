"""The processes of one run, and how they agree."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from veilspan.trainer.errors import TrainerError

if TYPE_CHECKING:
    from veilspan.parallel import ParallelMesh


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Where this process stands among those of the run.

    Args:
        device: Device of this process.
        mesh: Grid of `replicate` × `context` processes; None for a process on its own, which
            needs no other package.
    """

    device: torch.device
    mesh: ParallelMesh | None = None

    @property
    def size(self) -> int:
        """Number of processes."""
        return 1 if self.mesh is None else self.mesh.world_size

    @property
    def rank(self) -> int:
        """Index of this process."""
        return 0 if self.mesh is None else self.mesh.rank

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files and talks to the user."""
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        """Whether there are process groups."""
        return self.mesh is not None and self.mesh.device_mesh is not None

    @property
    def replicas(self) -> tuple[int, int]:
        """Index of this process's copy of the model, and the number of copies."""
        return (
            (0, 1) if self.mesh is None else (self.mesh.replicate_rank, self.mesh.replicate_degree)
        )

    @property
    def context(self) -> tuple[int, int]:
        """Index of this process's part of each sequence, and the number of parts."""
        return (0, 1) if self.mesh is None else (self.mesh.context_rank, self.mesh.context_degree)

    def broadcast(self, value: Any) -> Any:
        """Return the first process's value on every process; it travels in memory only."""
        if not self.distributed:
            return value
        box = [value if self.is_first else None]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def sum(self, values: Tensor) -> Tensor:
        """Return `values` summed over all processes."""
        if self.distributed:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values

    def largest(self, value: float) -> float:
        """Return the largest value over all processes."""
        if not self.distributed:
            return value
        box = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(box, op=dist.ReduceOp.MAX)
        return float(box.item())

    def apart(self, told: Mapping[str, str]) -> list[str]:
        """Return the names of what is not the same on all of several processes, in memory only."""
        everywhere: list[Mapping[str, str]] = [{}] * self.size
        dist.all_gather_object(everywhere, told)
        return [name for name in told if len({one[name] for one in everywhere}) > 1]

    def barrier(self) -> None:
        """Wait for every process."""
        if self.distributed:
            dist.barrier()

    @contextmanager
    def together(
        self, explain: Callable[[Exception], Exception] = lambda error: error
    ) -> Iterator[None]:
        """Fail on every process if the block fails on any, with the error of the first of these.

        The block must not wait for other processes after the point where it may fail.

        Args:
            explain: Turns what was raised into the error that every process raises; its class
                must be constructible from its message.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = explain(error)
            failure.__cause__ = error if failure is not error else error.__cause__
        if self.distributed:
            failures: list[tuple[type[Exception], str] | None] = [None] * self.size
            mine = None if failure is None else (type(failure), str(failure))
            dist.all_gather_object(failures, mine)
            first = next((pair for pair in failures if pair is not None), None)
            if first is not None and first != mine:  # all raise the same, or they would part
                own, failure = failure, first[0](first[1])
                failure.__cause__ = own
        if failure is not None:
            raise failure


def join_processes(*, replicate: int, context: int, device: str) -> Processes:
    """Join the processes that torchrun started, or run alone.

    Args:
        replicate: Copies of the model.
        context: Processes that hold one sequence together.
        device: "auto", "cpu" or "cuda".

    Raises:
        TrainerError: If the launcher started another number of processes, a device is missing, or
            several processes are asked for without the package veilspan-parallel.
    """
    kind = _device_type(device)
    launched = dist.is_torchelastic_launched() or dist.is_initialized()
    if kind == "cuda":
        torch.cuda.set_device(_local_rank() if launched else 0)
    place = (
        torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
    )
    if replicate * context == 1 and not launched:
        return Processes(device=place)
    if importlib.util.find_spec("veilspan.parallel") is None:
        raise TrainerError(
            f"parallel.replicate × parallel.context is {replicate} × {context}; running under "
            "torchrun or in several processes needs: pip install 'veilspan-trainer[parallel]'"
        )
    from veilspan.parallel import build_mesh

    try:
        mesh = build_mesh(replicate=replicate, context=context, device_type=kind)
    except ValueError as error:
        raise TrainerError(
            f"The recipe needs parallel.replicate × parallel.context = {replicate} × {context} = "
            f"{replicate * context} process(es); start it with: torchrun --nproc-per-node "
            f"{replicate * context} -m veilspan.trainer train … ({error})"
        ) from error
    return Processes(device=place, mesh=mesh)


def leave_processes() -> None:
    """End this process's part of the run; call it last in a program, never after an error.

    Under gloo the process ends here, because gloo's own teardown sometimes aborts.
    """
    if dist.is_initialized():
        from veilspan.parallel import finish

        finish()


def _local_rank() -> int:
    from torch.distributed.distributed_c10d import get_node_local_rank

    return get_node_local_rank(fallback_rank=0)


def _device_type(device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        raise TrainerError(
            'compute.device is "cuda", but torch finds no GPU here; set it to "cpu" or "auto".'
        )
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device
