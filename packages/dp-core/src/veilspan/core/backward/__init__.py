"""Backward strategies: what is kept of a micro-batch until its clipping factors are known."""

from __future__ import annotations

import torch
from torch import Tensor

from veilspan.core.attachment import NO_OTHER_BACKWARD
from veilspan.core.backward.base import Backward, Workspace
from veilspan.core.backward.bookkeeping import BookKeeping, PerLayerClipping
from veilspan.core.backward.outside import nothing_trained_outside
from veilspan.core.backward.per_sample import PerSample
from veilspan.core.backward.reach import reaches_its_record_alone
from veilspan.core.backward.single_sample import SingleSample
from veilspan.core.backward.two_pass import TwoPass
from veilspan.core.checks import refuse_rounded_products, second_pass_explained

__all__ = ["STRATEGIES", "Backward", "Workspace", "probe", "run_micro_batch"]

STRATEGIES: dict[str, Backward] = {
    strategy.name: strategy
    for strategy in (SingleSample(), PerSample(), BookKeeping(), TwoPass(), PerLayerClipping())
}


def probe(work: Workspace, losses_B: Tensor) -> None:
    """Probe a forward pass of its own, of which nothing is added to the sum.

    Raises:
        PrivacyError: If the last loss reaches another record, or what is trained beside the model.
    """
    with nothing_trained_outside(work.attachment, losses_B):
        _probe(work, losses_B)


def _probe(work: Workspace, losses_B: Tensor, is_record_B: Tensor | None = None) -> None:
    """Note whether the last loss was seen to reach its own record alone, on all ranks of a split.

    Such ranks go on probing until all have seen it, since each must run the backward passes of the
    others.
    """
    seen = reaches_its_record_alone(work.attachment, losses_B, is_record_B)
    together = work.sums.together
    alike = together is None or together.agree(int(seen))
    work.separable = alike and seen


def run_micro_batch(work: Workspace, losses_B: Tensor) -> None:
    """Probe the first micro-batch of several records, then run the strategy of this one.

    Raises:
        PrivacyError: If a `.grad` is there, which the step did not make, or a loss reaches another
            record or what is trained beside the model.
    """
    batch = work.attachment.micro_batch
    strategy = STRATEGIES[batch.strategy if batch else "single_sample"]
    if strategy.tapped:
        refuse_rounded_products(losses_B)
    work.attachment.require_no_gradients("before step.backward", NO_OTHER_BACKWARD)
    work.measure.begin()
    # Under the caller's autocast, norms and sums would be products of operands rounded to bf16.
    own_only = nothing_trained_outside(work.attachment, losses_B)
    with own_only, second_pass_explained(), torch.autocast(losses_B.device.type, enabled=False):
        if not work.separable:
            _probe(work, losses_B, work.is_record_B)
        strategy.run(work, losses_B)
