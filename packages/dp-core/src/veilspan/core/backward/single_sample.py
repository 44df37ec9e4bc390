"""One record a micro-batch: the gradient that autograd forms is the per-sample gradient.

It needs no taps, works for any module, and under FSDP2 the reduce-scatter over the context axis is
the per-sample gradient shard. The norm is taken of the very numbers that are summed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from veilspan.core.backward.base import STORED_SLACK, Workspace
from veilspan.core.errors import UnsupportedModelError
from veilspan.core.fsdp import plain_sums
from veilspan.core.norms import sq_norm


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
        with plain_sums(work.attachment.model, work.shards.degree):
            losses_B.sum().backward()
        owned, index = work.owned, work.groups.index
        found = {n: p.grad for n, p in owned.items() if p.grad is not None}
        grads = {n: work.shards.local(_dense(grad)) for n, grad in found.items()}
        sq_norm_M = torch.zeros(len(work.groups), dtype=torch.float64, device=losses_B.device)
        for name, grad in grads.items():
            sq_norm_M[index[name]] += sq_norm(grad)
        if work.shards.degree > 1:
            reached_P = sq_norm_M.new_tensor([name in grads for name in owned])
            sums = work.shards.sum_scalars(torch.cat((sq_norm_M, reached_P)))
            sq_norm_M, reached = sums[: len(sq_norm_M)], sums[len(sq_norm_M) :].tolist()
            _require_all_or_none(dict(zip(owned, reached, strict=True)), work.shards.degree)
        factor_M1 = work.all_factors(sq_norm_M[:, None], slack=work.slack(fp32=STORED_SLACK))
        for name, grad in grads.items():
            owned[name].grad = None
            work.sums.add_(name, grad, factor_M1[index[name], 0].to(grad.device))


def _require_all_or_none(ranks: Mapping[str, float], degree: int) -> None:
    """Refuse gradients that FSDP2 may have added to those of other parameters.

    Args:
        ranks: How many ranks have a gradient of each parameter.
        degree: Ranks that hold the sequence.

    Raises:
        UnsupportedModelError: Naming a parameter.
    """
    some = next((name for name, count in ranks.items() if count not in (0, degree)), None)
    if some is not None:
        raise UnsupportedModelError(
            f"Parameter '{some}' has a gradient on {ranks[some]:.0f} of the {degree} ranks that "
            "hold a sequence, so FSDP2 may have added gradients of different parameters. Use torch "
            "2.13, which reduces zeros for the others, or a layer that every rank's tokens reach."
        )


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient
