"""From units to one loss per unit, whether a sequence is whole or split over processes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from veilspan.core import UnsupportedModelError
from veilspan.core.head import fused_causal_lm_losses
from veilspan.core.losses import causal_lm_losses
from veilspan.trainer.data import Batch
from veilspan.trainer.errors import ModelError
from veilspan.trainer.processes import Processes
from veilspan.trainer.recipe import Recipe

if TYPE_CHECKING:
    from veilspan.parallel import Layout


class SequenceLosses:
    """Next-token losses of a batch, or this process's share of them.

    Args:
        recipe: Says how long sequences are and how they are split.
        processes: Who holds the other parts.
        chunked: Whether the logits of a unit never exist as a whole.

    Attributes:
        layout: Which positions each process holds; None where sequences are whole.
        chunked: As given.
    """

    def __init__(self, recipe: Recipe, processes: Processes, *, chunked: bool = False) -> None:
        self._processes = processes
        self._attention: Literal["auto", "ulysses", "allgather"] = recipe.parallel.attention
        self._lowered = recipe.model.dtype == "bfloat16" and recipe.shards == 1
        self.chunked = chunked
        self.layout: Layout | None = None
        if processes.context[1] > 1:
            from veilspan.parallel import Layout

            self.layout = Layout(
                length=recipe.data.sequence_length,
                ranks=processes.context[1],
                kind=recipe.parallel.layout,
            )

    def sharing(self) -> AbstractContextManager[object]:
        """Return a context that must enclose every forward pass together with its backward."""
        if self.layout is None or self._processes.mesh is None:
            return nullcontext()
        from veilspan.parallel import context_parallel

        return context_parallel(self._processes.mesh, self.layout, attention=self._attention)

    def autocast(self) -> AbstractContextManager[object]:
        """Return what whole models compute in; others are told when they are split."""
        device = self._processes.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self._lowered)

    def losses_B(  # noqa: N802 - per-sample
        self, model: nn.Module, batch: Batch, *, reduction: Literal["mean", "sum"] = "mean"
    ) -> Tensor:
        """Return one loss per unit, `[B]` fp32; with split sequences, this process's share.

        Shares of one unit add up to its loss over the processes that hold it, so no collective is
        needed: gradients are summed where parameters are shared anyway.

        Args:
            model: Hugging Face causal language model.
            batch: Whole sequences, `[B, T]`; every process passes the same ones.
            reduction: Over the tokens of each unit.
        """
        device = self._processes.device
        ids, labels = batch.input_ids.to(device), batch.labels.to(device)
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        scored: dict[str, Any] = {"labels": labels, "reduction": reduction}
        if self.layout is not None:
            from veilspan.parallel import shard_batch

            part = shard_batch(ids, labels, self.layout, self._processes.context[0])
            inputs |= {"input_ids": part.input_ids, "position_ids": part.position_ids}
            scored |= {"labels": part.labels, "shifted": True}
            if reduction == "mean":
                scored["num_tokens_B"] = part.num_tokens_B
        with self.autocast():
            if self.chunked:
                return _chunked_losses(model, inputs | scored)
            logits = model(**inputs).logits
        return causal_lm_losses(logits, **scored)


def _chunked_losses(model: nn.Module, arguments: dict[str, Any]) -> Tensor:
    try:
        return fused_causal_lm_losses(model, **arguments)
    except UnsupportedModelError as error:
        raise ModelError(f'{error} In a recipe: compute.logits = "whole".') from error
