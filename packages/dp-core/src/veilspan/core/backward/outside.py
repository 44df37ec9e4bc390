"""Parameters that a loss reaches but the step does not own: they would be trained without noise."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from veilspan.core.attachment import Attachment
from veilspan.core.errors import PrivacyError
from veilspan.core.fsdp import gathered_parameters


def refuse_parameters_outside(attachment: Attachment, losses_B: Tensor) -> None:
    """Refuse losses that reach a parameter which is not the model's; once in a logical batch.

    Seen where autograd's graph shows it: not inside of a block under reentrant checkpointing.

    Raises:
        PrivacyError: Telling the parameter's shape.
    """
    if attachment.looked_outside:
        return
    model = attachment.model
    known = {id(p) for p in (*attachment.owned.values(), *model.parameters())}
    known |= {id(p) for p in gathered_parameters(model)}
    for leaf in _leaves(losses_B):
        if isinstance(leaf, nn.Parameter) and id(leaf) not in known:
            raise PrivacyError(
                f"The losses reach a parameter of shape {tuple(leaf.shape)} which is not one of "
                "the model that PrivateStep was given, so its gradient would be neither clipped "
                "nor noised. Build PrivateStep on one module that holds all that is trained, "
                "nn.ModuleList([model, head]) say; or call what is not trained, such as a teacher, "
                "under torch.no_grad(), or requires_grad_(False) on it."
            )
    attachment.looked_outside = True


def _leaves(losses_B: Tensor) -> Iterator[Tensor]:
    """Yield the leaves of autograd's graph."""
    nodes = [losses_B.grad_fn]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node is None:
            continue
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            yield leaf
        new = {following for following, _ in node.next_functions} - seen
        seen |= new
        nodes += new
