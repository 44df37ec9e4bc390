"""Which records a loss reaches: it must be its own and no other, and alike beside all others."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from veilspan.core.attachment import Attachment
from veilspan.core.errors import PrivacyError
from veilspan.core.micro_batch import Pass, Use


@dataclass
class ReachPass:
    """Finds which samples a loss reaches, module by module.

    Args:
        reached_B: Whether a sample's output gradient is not zero anywhere, by module path.
    """

    reached_B: dict[str, Tensor] = field(default_factory=dict)
    keeps: bool = False

    def receive(self, use: Use) -> None:
        """Note the samples that the gradient reaches."""
        name = use.site.name
        self.reached_B[name] = self.reached_B.get(name, False) | use.reached()


@dataclass
class SizePass:
    """Looks at the gradient of one record on its way to another pass.

    A gradient that is changed on its way back, by a hook or a function of the model's own, may not
    depend on the gradients of other records: it must be as large beside theirs as it is alone.

    Args:
        record: Row of the record.
        wanted: The other pass.
        sq_sizes: Squared norm of the record's output gradients, by module path.
        grain: Spacing of the coarsest numbers among them.
    """

    record: int
    wanted: Pass
    sq_sizes: dict[str, Tensor] = field(default_factory=dict)
    grain: float = 0.0

    @property
    def keeps(self) -> bool:
        """What the other pass does."""
        return self.wanted.keeps

    def receive(self, use: Use) -> None:
        """Note how large the record's gradient is, and pass it on."""
        name, sq_size = use.site.name, use.sq_size(self.record)
        self.sq_sizes[name] = self.sq_sizes.get(name, 0.0) + sq_size
        self.grain = max(self.grain, torch.finfo(use.dtype).eps)
        self.wanted.receive(use)

    @contextmanager
    def beside_others(self, wanted: Pass) -> Iterator[Pass]:
        """Look at a backward pass of all losses, after one of the record's own loss.

        Raises:
            PrivacyError: If the record's gradient is not what it was.
        """
        again = SizePass(self.record, wanted)
        yield again
        sizes, grain = again._sizes(), max(self.grain, again.grain)
        alone = self._sizes()
        least = grain * max(alone.values(), default=0.0)
        for name in {**alone, **sizes}:  # from the loss on, so that all ranks name the same
            before, now = alone.get(name, 0.0), sizes.get(name, 0.0)
            same = abs(now - before) <= math.sqrt(grain) * max(now, before) + least
            if math.isfinite(before) and not same:
                raise PrivacyError(
                    f"The gradient of record {self.record} at the output of module '{name}' "
                    "depends on the gradients of the other records of the micro-batch: clipping "
                    "one record would not bound its influence. Look for a hook or an "
                    "autograd.Function that scales gradients by a norm over the batch, and let it "
                    "treat each record on its own; for activation checkpointing that draws other "
                    "random numbers when it runs a block again, as from a torch.Generator of the "
                    "model's own; or use backward='single_sample'."
                )

    def _sizes(self) -> dict[str, float]:
        return {name: math.sqrt(float(sq_size)) for name, sq_size in self.sq_sizes.items()}


def reaches_its_record_alone(
    attachment: Attachment, losses_B: Tensor, is_record_B: Tensor | None = None
) -> bool:
    """Return whether the loss of the last record was seen to reach that record, and no other.

    The last one, because what a model takes of one row for all of them it takes of the first, as
    `positions(ids[None])[0]` does.

    Args:
        attachment: The model, with a micro-batch in progress.
        losses_B: One loss per record; its graph is kept.
        is_record_B: Which rows are records; None for all of them.

    Returns:
        False where nothing can be told: fewer than two records, no taps, a gradient of zero.

    Raises:
        PrivacyError: If the loss reaches another record.
    """
    batch = attachment.micro_batch
    if batch is None or batch.size < 2:
        return False
    last = batch.size - 1
    if is_record_B is not None and bool(is_record_B.any()):
        last = int(is_record_B.nonzero()[-1])
    reach = ReachPass()
    alone = SizePass(last, reach)
    batch.differentiate(losses_B[last], alone, keep_graph=True)
    attachment.require_owned_gradients_only()
    for name, reached_B in reach.reached_B.items():
        if bool(reached_B[:last].any() | reached_B[last + 1 :].any()):
            raise PrivacyError(
                f"The loss of record {last} depends on other records of the micro-batch (seen at "
                f"module '{name}'): clipping one record would not bound its influence. Look for a "
                "batch-wide mean, an auxiliary or contrastive loss, attention across records, one "
                "row taken for all of them, or a batch dimension that is not first."
            )
    batch.watched = alone.beside_others
    reached = any(bool(reached_B[last]) for reached_B in reach.reached_B.values())
    return reached and bool(losses_B.isfinite().all())
