"""What a loss reaches but the step does not own: it would be trained without noise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from veilspan.core.attachment import Attachment
from veilspan.core.errors import PrivacyError
from veilspan.core.fsdp import gathered_parameters

_LOOKS = 2  # in a logical batch: in the second one, what is trained shows that it stays


@contextmanager
def nothing_trained_outside(attachment: Attachment, losses_B: Tensor) -> Iterator[None]:
    """Refuse losses that reach what is trained beside the model, around their backward pass.

    Seen where autograd's graph shows it: not inside of a block under reentrant checkpointing.

    A tensor that is no parameter may be an input, which is made anew for each micro-batch: one that
    is met again is refused, and none keeps the gradient by which it could be trained.

    Raises:
        PrivacyError: Telling the shape of the parameter or tensor.
    """
    _look(attachment, losses_B)
    try:
        yield
    finally:
        for ref in attachment.met_outside:
            leaf = ref()
            if leaf is not None:
                leaf.grad = None


def _look(attachment: Attachment, losses_B: Tensor) -> None:
    if attachment.looks_outside >= _LOOKS:
        return
    attachment.looks_outside += 1
    model, batch = attachment.model, attachment.micro_batch
    known = {id(p) for p in (*attachment.owned.values(), *model.parameters())}
    known |= {id(p) for p in gathered_parameters(model)}
    known |= {id(batch.anchor)} if batch else set()
    met = [leaf for ref in attachment.met_outside if (leaf := ref()) is not None]
    again = {id(leaf) for leaf in met}
    for leaf in _leaves(losses_B):
        if id(leaf) in known:
            continue
        if isinstance(leaf, nn.Parameter):
            _refuse(f"a parameter of shape {tuple(leaf.shape)} which is not one of the model that")
        if id(leaf) in again:
            _refuse(
                f"a tensor of shape {tuple(leaf.shape)} which requires a gradient, as an earlier "
                "micro-batch did, but is no parameter of the model that"
            )
        met.append(leaf)
    attachment.met_outside = [TensorWeakRef(leaf) for leaf in met]


def _refuse(what: str) -> NoReturn:
    raise PrivacyError(
        f"The losses reach {what} PrivateStep was given, so its gradient would be neither clipped "
        "nor noised. Build PrivateStep on one module that holds all that is trained, as "
        "parameters, nn.ModuleList([model, head]) say; or call what is not trained, such as a "
        "teacher, under torch.no_grad(), or requires_grad_(False) on it."
    )


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
