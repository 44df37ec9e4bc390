"""The private step: one logical batch, one noise draw, one release."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from torch import Tensor, nn

from veilspan.core.attachment import Attachment
from veilspan.core.backward import STRATEGIES, Workspace
from veilspan.core.checks import check_losses, check_numbers
from veilspan.core.clipping import Flat
from veilspan.core.errors import PrivacyError
from veilspan.core.noise import GaussianNoise, new_key
from veilspan.core.norms import BlockedKernel
from veilspan.core.plan import plan_for
from veilspan.core.protocols import GradientReduction, NoiseSource, NormKernel, SequenceShards
from veilspan.core.reduction import LocalShards, NoReduction
from veilspan.core.sums import ClippedSum
from veilspan.core.survey import owned_modules, refuse_cross_sample_layers, trainable_parameters
from veilspan.core.taps import Pass


@dataclass(frozen=True, kw_only=True)
class Release:
    """What one logical batch is about to release, announced before its noise exists.

    Args:
        step: Index of the logical batch.
        noise_multiplier: Noise standard deviation over `sensitivity`.
        sensitivity: L2 sensitivity of the clipped sum.
        expected_batch_size: Public constant that divides the noisy sum.
    """

    step: int
    noise_multiplier: float
    sensitivity: float
    expected_batch_size: float


class PrivateStep:
    """Turn per-record losses into a private gradient in every parameter's `.grad`.

    Inside `with step:` any number of micro-batches, none included, call `step.backward(losses_B)`.
    On a clean exit every trainable parameter's `.grad` is `(Σ clipped + noise) /
    expected_batch_size`; an exception inside discards the batch, and nothing is released.

    Args:
        model: The model; patched at its instances until `detach`, never wrapped.
        clipping: Who shares a threshold, and how a norm becomes a factor.
        noise_multiplier: σ, the noise standard deviation in units of the sensitivity; 0 for exact
            clipped means with an ε of infinity.
        expected_batch_size: Public constant, `sampling_probability * num_records`; never the
            length of a drawn batch.
        backward: `auto`, `single_sample`, `per_sample` or `two_pass`.
        norms: `auto`, `direct` or `gram`: norm method of linear maps in `two_pass`.
        kernel: Per-sample arithmetic of linear maps.
        noise: Noise source; by default a cryptographic stream with a fresh key from the operating
            system.
        shards: Who holds the rest of each sample and parameter; by default everything is here.
        reduction: Sum over replicas, once per logical batch.
        on_release: Called with each `Release` before its noise exists. What it raises stops the
            release: connect the privacy ledger here.
        first_step: Index of the first logical batch, after a restart.

    Raises:
        ValueError: If an argument is outside of its range.
        UnsupportedModelError: If a trainable module cannot be clipped per record.

    Guarantee:
        With one loss per record, adding or removing one record changes the sum before noise by at
        most `clipping.sensitivity` in L2 norm, up to fp32 rounding of the accumulated sum; the
        noise on every coordinate is N(0, (σ·sensitivity)²) before division. Abadi et al. (2016),
        https://arxiv.org/abs/1607.00133.

    Examples:
        >>> import torch
        >>> from veilspan.core import Flat, PrivateStep
        >>> model = torch.nn.Linear(3, 1)
        >>> step = PrivateStep(
        ...     model, clipping=Flat(clip_norm=1.0), noise_multiplier=1.0, expected_batch_size=2
        ... )
        >>> with step:
        ...     step.backward(model(torch.randn(2, 3)).square().sum(1))
        >>> model.weight.grad.shape
        torch.Size([1, 3])
        >>> step.detach()
    """

    def __init__(  # noqa: PLR0913 - the public contract: each is one seam or one number
        self,
        model: nn.Module,
        *,
        clipping: Flat,
        noise_multiplier: float,
        expected_batch_size: float,
        backward: str = "auto",
        norms: str = "auto",
        kernel: NormKernel | None = None,
        noise: NoiseSource | None = None,
        shards: SequenceShards | None = None,
        reduction: GradientReduction | None = None,
        on_release: Callable[[Release], None] | None = None,
        first_step: int = 0,
    ) -> None:
        check_numbers(clipping, noise_multiplier, expected_batch_size, first_step)
        refuse_cross_sample_layers(model)
        self.clipping = clipping
        self.noise_multiplier = float(noise_multiplier)
        self.expected_batch_size = float(expected_batch_size)
        self.next_step = first_step
        self._model = model
        self._noise = noise or GaussianNoise(new_key())
        self._shards = shards or LocalShards()
        self._reduction = reduction or NoReduction()
        self._on_release = on_release
        owned = trainable_parameters(model)
        for parameter in owned.values():
            self._shards.local(parameter.detach())  # refuses what it cannot place, before training
        may_tap = backward != "single_sample" and self._shards.degree == 1
        modules = list(owned_modules(model, (kernel or BlockedKernel()) if may_tap else None))
        self._plan = plan_for(
            model, modules, backward=backward, norms=norms, degree=self._shards.degree
        )
        self._attachment = Attachment(
            model,
            owned,
            modules if self._plan.may_tap else (),
            norm_method=self._plan.norm_method,
            tapped=self._plan.tapped,
        )
        self._work = Workspace(
            attachment=self._attachment,
            clipping=clipping,
            shards=self._shards,
            sums=ClippedSum(owned, self._shards),
        )
        self._entered = False
        self._attached = True
        self._separable = False

    def __enter__(self) -> Self:
        """Begin a logical batch."""
        if not self._attached:
            raise PrivacyError("This PrivateStep was detached from its model; build a new one.")
        if self._entered:
            raise PrivacyError("This PrivateStep is already inside a `with` block; leave it first.")
        self._require_same_parameters()
        self._require_no_gradients("before the logical batch", "optimizer.zero_grad()")
        self._entered = True
        self._attachment.activate(True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release the noisy mean, or discard everything when the block raised."""
        self._entered = False
        self._attachment.activate(False)
        try:
            if kind is None:
                self._require_same_parameters()
                self._require_no_gradients("inside the logical batch", "step.backward(losses_B)")
                self._release()
        except BaseException:
            self._discard()
            raise
        if kind is not None:
            self._discard()

    def backward(self, losses_B: Tensor) -> None:
        """Add the clipped gradients of one micro-batch to the logical batch.

        Args:
            losses_B: One loss per record, `[B]`, floating point; B may be 0. Under context
                parallelism this rank's share of each loss.

        Raises:
            PrivacyError: If called outside of `with step:`, if the losses are not one per record,
                if a loss depends on another record, or if a gradient reached a parameter around
                its module.
        """
        if not self._entered:
            raise PrivacyError(
                "step.backward was called outside of `with step:`. One block is one logical batch: "
                "one noise draw, one release."
            )
        check_losses(losses_B)
        if len(losses_B) == 0:
            self._attachment.end_micro_batch()
            return
        batch = self._attachment.micro_batch
        if batch is not None and batch.size != len(losses_B):
            raise PrivacyError(
                f"losses_B holds {len(losses_B)} losses, but the model's input holds {batch.size} "
                "records. Return one loss per record (mean or sum over that record's own tokens)."
            )
        try:
            self._probe_separability(losses_B)
            STRATEGIES[batch.strategy if batch else "single_sample"].run(self._work, losses_B)
        finally:
            self._attachment.end_micro_batch()

    @property
    def model(self) -> nn.Module:
        """The model that this step is attached to."""
        return self._model

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Trainable parameters by the name that addresses their noise."""
        return self._attachment.owned

    @property
    def takes_single_samples(self) -> bool:
        """Whether every micro-batch must hold one record."""
        return not self._plan.may_tap

    def path_of(self, parameter: nn.Parameter) -> str:
        """Return the rule that produces this parameter's norm, or the strategy that needs none."""
        return self._plan.path_of(parameter)

    def explain(self) -> str:
        """Return the strategies in use, with the reasons, and the path of each trainable module."""
        lengths = {site.name: math.prod(site.last_shape[1:-1]) for site in self._attachment.sites}
        return self._plan.table(lengths)

    def detach(self) -> None:
        """Undo every patch: the model is the user's own again."""
        self._attachment.detach()
        self._attached = False

    def _probe_separability(self, losses_B: Tensor) -> None:
        """Once, on the first micro-batch of two or more: loss 0 must not reach another record."""
        batch = self._attachment.micro_batch
        if self._separable or batch is None or batch.size < 2:
            return
        batch.differentiate(losses_B[0], Pass.PROBE, keep_graph=True)
        self._attachment.require_owned_gradients_only()
        for name, reached_B in batch.reached_B.items():
            if bool(reached_B[1:].any()):
                raise PrivacyError(
                    f"The loss of record 0 depends on other records of the micro-batch (seen at "
                    f"module '{name}'): clipping one record would not bound its influence. Look "
                    "for a batch-wide mean, an auxiliary or contrastive loss, attention across "
                    "records, or a batch dimension that is not first."
                )
            self._separable |= bool(reached_B[0]) and bool(losses_B.isfinite().all())

    def _release(self) -> None:
        sums = self._work.sums.take()
        self._reduction.sum_(list(sums.values()))
        release = Release(
            step=self.next_step,
            noise_multiplier=self.noise_multiplier,
            sensitivity=self.clipping.sensitivity,
            expected_batch_size=self.expected_batch_size,
        )
        if self._on_release is not None:
            self._on_release(release)
        self.next_step += 1
        stddev = self.noise_multiplier * self.clipping.sensitivity if self.noise_multiplier else 0.0
        for name, parameter in self._attachment.owned.items():
            total = sums.pop(name)
            if stddev:
                offset = self._shards.offset(parameter)
                self._noise.add_(total, stddev=stddev, step=release.step, name=name, offset=offset)
            mean = total.div_(self.expected_batch_size).to(self._shards.local(parameter).dtype)
            parameter.grad = self._shards.restore(parameter, mean)

    def _discard(self) -> None:
        self._work.sums.discard()
        for parameter in self._attachment.owned.values():
            parameter.grad = None

    def _require_same_parameters(self) -> None:
        now = trainable_parameters(self._model)
        before = self._attachment.owned
        changed = [
            name
            for name in sorted(now.keys() | before.keys())
            if now.get(name) is not before.get(name)
        ]
        if changed:
            raise PrivacyError(
                f"Parameter '{changed[0]}' was added, replaced, frozen or unfrozen after "
                "PrivateStep was attached, so it would train outside of the mechanism. Call "
                "step.detach() and build a new PrivateStep."
            )

    def _require_no_gradients(self, when: str, way_out: str) -> None:
        stale = [name for name, p in self._attachment.owned.items() if p.grad is not None]
        if stale:
            raise PrivacyError(
                f"Parameter '{stale[0]}' holds a .grad {when} that this step did not make; it "
                f"would be added to the private gradient. Use {way_out} and no other backward."
            )
