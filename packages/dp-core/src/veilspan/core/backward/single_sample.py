"""One record a micro-batch: the gradient that autograd forms is the per-sample gradient.

It needs no taps, works for any module, and under FSDP2 the reduce-scatter over the context axis is
the per-sample gradient shard. The norm is taken of the very numbers that are summed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veilspan.core.backward.base import Workspace
from veilspan.core.norms import sq_norm

STORED_SLACK = 2.0**-19
"""Relative error, at most, of an fp32 norm taken of the very numbers that are summed."""


class SingleSample:
    """Extra FLOPs 0; keeps the sharded micro-gradient."""

    name = "single_sample"
    tapped = False

    def run(self, work: Workspace, losses_B: Tensor) -> None:
        """Differentiate the record's loss; clip what arrives in `.grad`; clear `.grad`."""
        if len(losses_B) != 1:
            raise ValueError(
                f"losses_B holds {len(losses_B)} losses, but backward='single_sample' takes "
                "micro-batches of one record. Use microbatches(size=1), or backward='per_sample'."
            )
        losses_B.sum().backward()
        owned = work.attachment.owned
        grads = {n: work.shards.local(p.grad) for n, p in owned.items() if p.grad is not None}
        sq_1 = torch.zeros(1, dtype=torch.float64, device=losses_B.device)
        for grad in grads.values():
            sq_1 += sq_norm(grad)
        sq_1 = work.shards.sum_scalars(sq_1)
        factor = float(work.clipping.factors(sq_1, slack=work.slack(fp32=STORED_SLACK)))
        for name, grad in grads.items():
            owned[name].grad = None
            work.sums.add_(name, grad, factor)
