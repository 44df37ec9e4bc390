"""Per-sample gradients kept until their norms are known: one backward pass, B·P memory."""

from __future__ import annotations

import torch
from torch import Tensor

from veilspan.core.backward.base import STORED_SLACK, Workspace
from veilspan.core.backward.passes import SamplePass


class PerSample:
    """Extra FLOPs 0; the norm is taken of the very numbers that are summed."""

    name = "per_sample"
    tapped = True

    def run(self, work: Workspace, losses_B: Tensor) -> None:
        """Form the per-sample gradients, weigh each sample by its factor, add."""
        batch = work.attachment.micro_batch
        assert batch is not None
        formed, index = SamplePass(work, batch), work.groups.index
        batch.differentiate(losses_B.sum(), formed)
        samples = formed.samples
        work.attachment.require_owned_gradients_only()
        shape = (len(work.groups), batch.size)
        sq_norm_MB = torch.zeros(shape, dtype=torch.float64, device=losses_B.device)
        for name in samples.names():
            sq_norm_MB[index[name]] += formed.sq_norms(name)
        factor_MB = work.all_factors(sq_norm_MB, slack=work.slack(fp32=STORED_SLACK))
        for name in samples.names():
            samples.flush(name, factor_MB[index[name]])
