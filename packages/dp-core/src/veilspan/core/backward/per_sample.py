"""Per-sample gradients kept until their norms are known: one backward pass, B·P memory."""

from __future__ import annotations

import torch
from torch import Tensor

from veilspan.core.backward.base import Workspace
from veilspan.core.backward.single_sample import STORED_SLACK
from veilspan.core.norms import sq_norms
from veilspan.core.taps import Pass


class PerSample:
    """Extra FLOPs 0; the norm is taken of the very numbers that are summed."""

    name = "per_sample"
    tapped = True

    def run(self, work: Workspace, losses_B: Tensor) -> None:
        """Fill the per-sample taps, weigh each sample by its factor, add."""
        attachment = work.attachment
        batch = attachment.micro_batch
        assert batch is not None
        batch.differentiate(losses_B.sum(), Pass.PER_SAMPLE)
        attachment.require_owned_gradients_only()
        sq_B = torch.zeros(batch.size, dtype=torch.float64, device=losses_B.device)
        taps = [(name, batch.sample_taps[id(p)]) for name, p in attachment.owned.items()]
        for _, tap in taps:
            if tap.grad is not None:
                sq_B += sq_norms(tap.grad)
        factor_B = work.clipping.factors(sq_B, slack=work.slack(fp32=STORED_SLACK))
        for name, tap in taps:
            if tap.grad is not None:
                work.sums.add_samples_(name, tap.grad, factor_B)
                tap.grad = None
