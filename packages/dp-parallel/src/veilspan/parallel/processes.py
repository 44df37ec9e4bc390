"""Start and end of worker processes beyond what torch does."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist

from veilspan.parallel.mesh import ParallelMesh


def broadcast_bytes(value: bytes | None, mesh: ParallelMesh) -> bytes:
    """Return the first rank's bytes on every rank; they travel in memory only.

    Meant for secret keys: one rank draws them from the operating system, no file or environment
    variable carries them.

    Args:
        value: The bytes on rank 0 of the mesh; ignored, and best None, on the other ranks.
        mesh: The processes that shall hold the bytes.

    Returns:
        The bytes of rank 0, on every rank.

    Raises:
        ValueError: If rank 0 passes None.

    Examples:
        >>> from veilspan.parallel import build_mesh
        >>> broadcast_bytes(b"key", build_mesh())
        b'key'
    """
    if mesh.rank == 0 and value is None:
        raise ValueError("value is None on rank 0; that rank must pass the bytes to broadcast.")
    if mesh.world_size == 1:
        return bytes(value or b"")
    mine = value if mesh.rank == 0 and value is not None else b""
    size = torch.tensor([len(mine)], dtype=torch.int64, device=mesh.device)
    dist.broadcast(size, src=0)
    payload = torch.zeros(int(size.item()), dtype=torch.uint8, device=mesh.device)
    if mesh.rank == 0:
        payload.copy_(torch.frombuffer(bytearray(mine), dtype=torch.uint8))
    dist.broadcast(payload, src=0)
    received = payload.cpu().numpy().tobytes()
    payload.zero_()
    return received


def finish(exit_code: int = 0) -> None:
    """End this process's part in a distributed run; call it last.

    Waits for the other ranks, destroys the process groups and flushes the standard streams. Where
    gloo is in use the process then ends at once with `os._exit`, without `atexit` handlers, because
    gloo's teardown at interpreter exit aborts about one process in twenty-five ("terminate called
    without an active exception"). Without process groups it only flushes and returns.

    Do not call it after an exception: let the process fail, and the launcher will end the others.

    Args:
        exit_code: Exit status of a process that is ended here.
    """
    started = dist.is_available() and dist.is_initialized()
    uses_gloo = started and "gloo" in dist.get_backend_config()
    if started:
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    if uses_gloo:
        os._exit(exit_code)
