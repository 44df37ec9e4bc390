"""Norms in a first backward pass, clipped sums in a second: no per-sample gradient is kept.

Both passes see the same activations and output gradients. The factor meets each layer's product,
not the loss, so the rounding of a low-precision backward pass cannot stretch a clipped gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veilspan.core.backward.base import Workspace
from veilspan.core.norms import sq_norms
from veilspan.core.taps import Pass

SLACK = 2.0**-18
"""Relative error, at most, of an fp32 norm formed by other arithmetic than the sum.

Cancellation inside a layer is guarded apart from this, in the norms themselves.
"""


class TwoPass:
    """Two more units of FLOPs; memory of an ordinary backward pass over a kept graph."""

    name = "two_pass"
    tapped = True

    def run(self, work: Workspace, losses_B: Tensor) -> None:
        """Fill the norm tap, then the sum taps; parameters used twice keep their gradients."""
        attachment = work.attachment
        batch = attachment.micro_batch
        assert batch is not None
        loss = losses_B.sum()
        batch.differentiate(loss, Pass.NORM, keep_graph=True)
        attachment.require_owned_gradients_only()
        sq_B = torch.zeros(batch.size, dtype=torch.float64, device=losses_B.device)
        if batch.norm_tap.grad is not None:
            sq_B += batch.norm_tap.grad
        shared = [(n, batch.sample_taps[id(p)]) for n, p in attachment.owned.items()]
        for _, tap in shared:
            if tap.grad is not None:
                sq_B += sq_norms(tap.grad)
        batch.factor_B = work.clipping.factors(sq_B, slack=work.slack(fp32=SLACK))
        batch.differentiate(loss, Pass.SUM)
        for name, tap in shared:
            if tap.grad is not None:
                work.sums.add_samples_(name, tap.grad, batch.factor_B)
                tap.grad = None
        for name, parameter in attachment.owned.items():
            total = batch.sum_taps[id(parameter)].grad
            if total is not None:
                work.sums.add_(name, total)
