"""Save a checkpoint of a small sharded model, or load one, and print its sums."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from veilspan.parallel import build_mesh, finish
from veilspan.trainer.checkpoint import Checkpoints, Progress, named_tensors
from veilspan.trainer.processes import Processes


def main(mode: str, folder: str, replicate: int, context: int) -> None:
    """Save in, or load from, `folder` with a grid of processes."""
    mesh = build_mesh(replicate=replicate, context=context)
    processes = Processes(device=torch.device("cpu"), mesh=mesh)
    torch.manual_seed(0 if mode == "save" else 1)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
    if mesh.device_mesh is not None:
        fully_shard(model, mesh=mesh.context_mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    checkpoints = Checkpoints(Path(folder), keep=2, processes=processes)
    if mode == "save":
        for value in (1.0, -2.0):
            model(torch.full((1, 3), value)).square().sum().backward()
            optimizer.step()
        progress = Progress(step=2, ledger_length=3, ledger_head="h", recipe_digest="d")
        checkpoints.save(named_tensors(model, optimizer), progress)
    else:
        newest = checkpoints.newest()
        assert newest is not None
        progress = checkpoints.load(newest, named_tensors(model, optimizer))
    tensors = named_tensors(model, optimizer)
    whole = {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).tolist()
        for name, tensor in tensors.items()
    }
    if processes.is_first:
        print(json.dumps({"tensors": whole, "step": progress.step}))
    finish()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
