"""Per-sample gradients kept until their norms are known: one backward pass, at most B·P memory.

Where sequences are short against a layer, its two factors are kept in their place, as in the mixed
form of book-keeping: Bu et al. (2023), https://arxiv.org/abs/2210.00038.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veilspan.core.backward.base import FORMED_SLACK, STORED_SLACK, Workspace
from veilspan.core.backward.samples import SamplePass


class PerSample:
    """Extra FLOPs 0, but for layers whose factors are kept: there, those of the Gram norm."""

    name = "per_sample"
    tapped = True

    def run(self, work: Workspace, losses_B: Tensor) -> None:
        """Form the per-sample gradients, weigh each sample by its factor, add."""
        batch = work.attachment.micro_batch
        assert batch is not None
        formed, index = SamplePass(work, batch), work.groups.index
        batch.differentiate(losses_B.sum(), formed)
        work.attachment.require_owned_gradients_only()
        shape = (len(work.groups), batch.size)
        sq_norm_MB = torch.zeros(shape, dtype=torch.float64, device=losses_B.device)
        for name in formed.names():
            sq_norm_MB[index[name]] += formed.sq_norms(name)
        slack = STORED_SLACK if formed.formed_only else FORMED_SLACK
        factor_MB = work.all_factors(sq_norm_MB, slack=work.slack(fp32=slack))
        with torch.no_grad():  # factors that were kept belong to a graph
            for name in formed.names():
                formed.flush(name, factor_MB[index[name]])
