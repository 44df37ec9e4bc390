"""Norms in a first backward pass, clipped sums in a second: no per-sample gradient is kept.

Both passes see the same activations and output gradients. The factor meets each layer's product,
not the loss, so the rounding of a low-precision backward pass cannot stretch a clipped gradient.
"""

from __future__ import annotations

from torch import Tensor

from veilspan.core.backward.base import FORMED_SLACK, Workspace
from veilspan.core.backward.passes import NormPass, SumPass
from veilspan.core.backward.repeats import SeenPass, nothing_drawn


class TwoPass:
    """Two more units of FLOPs; memory of an ordinary backward pass over a kept graph."""

    name = "two_pass"
    tapped = True

    def run(self, work: Workspace, losses_B: Tensor) -> None:
        """Take the norms, then the sums; parameters used twice keep their gradients."""
        batch = work.attachment.micro_batch
        assert batch is not None
        loss, norms = losses_B.sum(), NormPass(work, batch)
        first = SeenPass(norms)
        with nothing_drawn(batch.device):
            batch.differentiate(loss, first, keep_graph=True)
        work.attachment.require_owned_gradients_only()
        factor_MB = work.all_factors(norms.sq_norms(), slack=work.slack(fp32=FORMED_SLACK))
        kept = norms.shared.names()
        sums = SumPass(work, batch, factor_MB, kept)
        second = SeenPass(sums)
        batch.differentiate(loss, second)
        for name in kept:
            norms.shared.flush(name, factor_MB[work.groups.index[name]])
        sums.settle_all()
        first.require_repeated(second)
