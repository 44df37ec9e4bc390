"""Loss on records that the recipe declares public."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from veilspan.trainer.data import Records, collate
from veilspan.trainer.data.collate import IGNORE_INDEX
from veilspan.trainer.processes import Processes
from veilspan.trainer.sequences import SequenceLosses


@torch.no_grad()
def heldout_loss(
    model: nn.Module,
    records: Records,
    losses: SequenceLosses,
    processes: Processes,
    *,
    microbatch_size: int = 1,
) -> float:
    """Return the mean loss per token over all records, in nats; every process must call this.

    Copies of the model share the records out; processes that split sequences work on the same ones.

    Args:
        model: The model, in any mode; it is put back into that mode.
        records: Public records, at least one token to predict among them.
        losses: How a loss is computed.
        processes: Who takes part.
        microbatch_size: Records per forward pass.
    """
    training = model.training
    model.eval()
    replica, replicas = processes.replicas
    mine = range(replica, len(records), replicas)
    totals = torch.zeros(2, dtype=torch.float64)  # sum of losses, number of predicted tokens
    longest = -(-len(records) // replicas)
    with losses.sharing():
        for start in range(0, longest, microbatch_size):
            part = mine[start : start + microbatch_size]
            # Copies that hold the model together run alike; whose share is done, fills in.
            batch = collate(records, part or range(1))
            losses_B = losses.losses_B(model, batch, reduction="sum")
            if part:
                totals[0] += losses_B.double().sum().cpu()
                totals[1] += (batch.labels[:, 1:] != IGNORE_INDEX).sum() / processes.context[1]
    _split_again(model)
    model.train(training)
    loss, tokens = processes.sum(totals).tolist()
    return loss / tokens


def _split_again(model: nn.Module) -> None:
    """Let go of the whole weights that FSDP keeps after a forward pass without a backward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
