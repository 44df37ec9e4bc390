"""Which records a loss reaches: it must be its own and no other."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from veilspan.core.attachment import Attachment
from veilspan.core.errors import PrivacyError
from veilspan.core.taps import Use


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
    batch.differentiate(losses_B[last], reach, keep_graph=True)
    attachment.require_owned_gradients_only()
    for name, reached_B in reach.reached_B.items():
        if bool(reached_B[:last].any() | reached_B[last + 1 :].any()):
            raise PrivacyError(
                f"The loss of record {last} depends on other records of the micro-batch (seen at "
                f"module '{name}'): clipping one record would not bound its influence. Look for a "
                "batch-wide mean, an auxiliary or contrastive loss, attention across records, one "
                "row taken for all of them, or a batch dimension that is not first."
            )
    reached = any(bool(reached_B[last]) for reached_B in reach.reached_B.values())
    return reached and bool(losses_B.isfinite().all())
