"""Preflight: does every trainable parameter get an honest per-record gradient?

It runs once before training on two synthetic records, so what it finds depends on no private data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veilspan.core.errors import PrivacyError
from veilspan.core.step import PrivateStep
from veilspan.core.testing.oracle import Batch, ComputeLosses, batch_size, take


@dataclass(frozen=True, kw_only=True)
class ParameterPath:
    """How one trainable parameter gets its per-sample gradient.

    Args:
        name: Parameter name.
        shape: Its shape.
        path: The rule, or the strategy that needs none.
    """

    name: str
    shape: tuple[int, ...]
    path: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the preflight found: the path of each parameter, and that records do not couple."""

    parameters: tuple[ParameterPath, ...]
    records_probed: int

    def __str__(self) -> str:
        """Return one line per parameter."""
        width = max(len(p.name) for p in self.parameters)
        lines = [f"{p.name:<{width}}  {p.path:<22} {list(p.shape)}" for p in self.parameters]
        probed = f"records do not couple (probed on {self.records_probed} synthetic records)"
        return "\n".join([*lines, probed])


def preflight(step: PrivateStep, compute_losses: ComputeLosses, batch: Batch) -> Report:
    """Check a model with its loss before training; nothing is released and nothing is spent.

    Args:
        step: The private step, attached and not inside a `with` block.
        compute_losses: Losses `[B]` of a batch: `compute_losses(model, batch)`.
        batch: Two synthetic records of the shape of the training data; never private data.

    Returns:
        The path of each trainable parameter.

    Raises:
        PrivacyError: If a loss depends on the other record, in its value or in its gradient, if a
            parameter is used outside of its module, or if the losses are not one per record.
        ValueError: If the batch does not hold exactly two records.

    Guarantee:
        None by itself: two records cannot prove that no pair ever couples. It catches batch
        statistics, auxiliary and contrastive losses, batch-wide means, and flattened batches; not
        rows that are records only here, such as images where each record happens to have one.
    """
    if batch_size(batch) != 2:
        raise ValueError(f"batch holds {batch_size(batch)} records; preflight probes exactly two.")
    with torch.random.fork_rng():
        if not step.takes_single_samples:
            _refuse_coupled_values(step.model, compute_losses, batch)
        _probe_gradients(step, compute_losses, batch)
    paths = tuple(
        ParameterPath(name=name, shape=tuple(p.shape), path=step.path_of(p))
        for name, p in step.parameters.items()
    )
    return Report(parameters=paths, records_probed=batch_size(batch))


def _refuse_coupled_values(model: nn.Module, compute_losses: ComputeLosses, batch: Batch) -> None:
    """Refuse a loss whose value moves when the other record is replaced by a copy of its own."""

    def first_loss(records: Batch) -> Tensor:
        torch.manual_seed(0)  # the same dropout masks both times
        with torch.no_grad():
            losses_B = compute_losses(model, records)
        if losses_B.ndim != 1 or len(losses_B) != batch_size(records):
            raise PrivacyError(
                f"The losses of {batch_size(records)} records have shape {tuple(losses_B.shape)}; "
                "there must be one loss per record, shape [B]. Do not average over the batch."
            )
        return losses_B[0].double()

    twin = {name: torch.cat([value[:1], value[:1]]) for name, value in batch.items()}
    with_other, with_twin = first_loss(batch), first_loss(twin)
    grain = max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())
    rounding = min(256 * grain, 0.03)  # one shape, one arithmetic: as a rule, not a bit differs
    if (with_other - with_twin).abs() > rounding * with_twin.abs().clamp_min(grain):
        raise PrivacyError(
            f"The loss of record 0 is {with_twin:.6g} beside a copy of itself, but "
            f"{with_other:.6g} beside another record: the records of a micro-batch couple. Look "
            "for normalisation by batch statistics, a batch-wide mean, or attention across records."
        )


def _probe_gradients(step: PrivateStep, compute_losses: ComputeLosses, batch: Batch) -> None:
    """Run one discarded logical batch, in which the step's own checks see every use."""
    size = 1 if step.takes_single_samples else batch_size(batch)
    discarded = step._work.discarded  # one rank alone may run the preflight
    try:
        with step:
            if not step.takes_single_samples:  # selective checkpointing lets a graph be used once
                step.probe(compute_losses(step.model, batch))
            for start in range(0, batch_size(batch), size):
                step.backward(compute_losses(step.model, take(batch, start, start + size)))
            raise _NothingReleasedError
    except _NothingReleasedError:
        step._work.discarded = discarded


class _NothingReleasedError(Exception):
    """Leaves the probe's logical batch without a release."""
