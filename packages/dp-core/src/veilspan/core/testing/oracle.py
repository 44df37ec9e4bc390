"""The oracle: one record per backward pass, clip, add. Slow, obvious, and right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veilspan.core.groups import Clipping
from veilspan.core.survey import trainable_parameters

Batch = Mapping[str, Tensor]
"""Tensors of a micro-batch by name; dimension 0 of each is the records."""

ComputeLosses = Callable[[nn.Module, Batch], Tensor]
"""Losses of a batch, `[B]`, from the model and the batch."""


def take(batch: Batch, start: int, stop: int) -> dict[str, Tensor]:
    """Return records `start…stop` of a batch."""
    return {name: value[start:stop] for name, value in batch.items()}


def batch_size(batch: Batch) -> int:
    """Return the number of records of a batch."""
    return len(next(iter(batch.values())))


def per_sample_gradients(
    model: nn.Module, compute_losses: ComputeLosses, batch: Batch
) -> list[dict[str, Tensor]]:
    """Return the gradient of each record's loss, by parameter name, from one backward pass each.

    Args:
        model: A model that no private step is attached to.
        compute_losses: Losses `[B]` of a batch.
        batch: The records.
    """
    owned = trainable_parameters(model)
    gradients = []
    for b in range(batch_size(batch)):
        loss = compute_losses(model, take(batch, b, b + 1)).sum()
        found = torch.autograd.grad(loss, list(owned.values()), allow_unused=True)
        gradients.append(
            {
                name: torch.zeros_like(p) if grad is None else grad.detach()
                for (name, p), grad in zip(owned.items(), found, strict=True)
            }
        )
    return gradients


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """Norms, factors and clipped sum of a batch, all in fp64.

    Args:
        norm_B: Gradient norm of each record, `[B]`.
        clipped_sum: Σ_b factor_b · gradient_b by parameter name.
    """

    norm_B: Tensor
    clipped_sum: dict[str, Tensor]

    @classmethod
    def of(
        cls, model: nn.Module, compute_losses: ComputeLosses, batch: Batch, clipping: Clipping
    ) -> Oracle:
        """Return the oracle's answer for `batch`; a group that is not finite adds nothing."""
        gradients = per_sample_gradients(model, compute_losses, batch)
        owned = trainable_parameters(model)
        total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in owned.items()}
        groups = clipping.resolve({name: p.numel() for name, p in owned.items()})
        norms = []
        for gradient in gradients:
            wide = {name: grad.double() for name, grad in gradient.items()}
            norms.append(torch.stack([g.square().sum() for g in wide.values()]).sum().sqrt())
            for group in range(len(groups)):
                members = groups.members(group)
                sq_norm = torch.stack([wide[name].square().sum() for name in members]).sum()
                factor = groups.factors(group, sq_norm[None], slack=0.0)[0]
                for name in members if factor > 0 else ():
                    total[name] += factor * wide[name]
        return cls(norm_B=torch.stack(norms) if norms else torch.zeros(0), clipped_sum=total)

    def length(self) -> float:
        """Return the L2 norm of the clipped sum."""
        return flat(self.clipped_sum).norm().item()


def flat(gradients: Mapping[str, Tensor]) -> Tensor:
    """Return all gradients as one fp64 vector, in name order."""
    return torch.cat([gradients[name].double().flatten() for name in sorted(gradients)])
