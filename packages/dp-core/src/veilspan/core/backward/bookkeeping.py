"""Activations and output gradients kept until a group's factors are known: one backward pass.

Source: Bu et al. (2023), https://arxiv.org/abs/2210.00038; groups as in
https://arxiv.org/abs/2310.19215.
"""

from __future__ import annotations

from torch import Tensor

from veilspan.core.backward.base import FORMED_SLACK, Workspace
from veilspan.core.backward.passes import BookPass


class BookKeeping:
    """Extra FLOPs: the norm. Keeps the factors of one group at a time."""

    name = "bookkeeping"
    tapped = True

    def run(self, work: Workspace, losses_B: Tensor) -> None:
        """Keep books of each group in one backward pass; close each when it is complete."""
        run_books(work, losses_B, formed=False)


class PerLayerClipping:
    """Extra FLOPs 0; keeps nothing: a layer is clipped where its gradient is formed.

    The norm is taken of the very numbers that are summed. Needs groups that end within a layer.
    Layer-wise clipping as in He et al. (2022), https://arxiv.org/abs/2212.01539.
    """

    name = "per_layer"
    tapped = True

    def run(self, work: Workspace, losses_B: Tensor) -> None:
        """Clip and add each layer's gradients in its own backward, formed if norms are exact."""
        run_books(work, losses_B, formed=work.measure.exact)


def run_books(work: Workspace, losses_B: Tensor, *, formed: bool) -> None:
    """Run one backward pass that keeps books.

    Args:
        work: The step's parts.
        losses_B: One loss per record.
        formed: Form each sample's gradient once where one use of one module completes a group.
    """
    batch = work.attachment.micro_batch
    assert batch is not None
    books = BookPass(work, batch, slack=work.slack(fp32=FORMED_SLACK), formed=formed)
    batch.differentiate(losses_B.sum(), books)
    work.attachment.require_owned_gradients_only()
    books.close_all()
