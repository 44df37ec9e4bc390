"""The private step: one logical batch, one noise draw, one release."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from veilspan.core.agreement import reduce_alike
from veilspan.core.attachment import CLEAR_GRADIENTS, Attachment, detach_copies
from veilspan.core.backward import Workspace, probe, run_micro_batch
from veilspan.core.checks import (
    FixedWhenBuilt,
    check_losses,
    check_numbers,
    records_only,
    refuse_mixed_gradients,
    require_agreement,
)
from veilspan.core.errors import PrivacyError
from veilspan.core.explain import explain
from veilspan.core.fsdp import show_shards
from veilspan.core.groups import Clipping
from veilspan.core.norms import BlockedKernel
from veilspan.core.plan import Wishes, plan_for
from veilspan.core.protocols import GradientReduction, NoiseSource, NormKernel, SequenceShards
from veilspan.core.reduction import LocalShards, NoReduction, own_noise
from veilspan.core.release import GaussianMechanism, Release, with_thresholds
from veilspan.core.sketch import Sketch
from veilspan.core.sums import ClippedSum, accumulator_named
from veilspan.core.survey import owned_modules, refuse_cross_sample_layers, trainable_parameters


class PrivateStep(FixedWhenBuilt, names=("clipping", "noise_multiplier", "expected_batch_size")):
    """Turn per-record losses into a private gradient in every parameter's `.grad`.

    Inside `with step:` any number of micro-batches, none included, call `step.backward(losses_B)`.
    On a clean exit every trainable parameter's `.grad` is `(Σ clipped + noise) /
    expected_batch_size`; an exception inside discards the batch, and nothing is released.

    Args:
        model: The model; patched at its instances until `detach`, never wrapped.
        clipping: Who shares a threshold, and how a norm becomes a factor.
        noise_multiplier: σ, the noise standard deviation in units of the sensitivity; at 0, ε is ∞.
        expected_batch_size: Public constant, `sampling_probability * num_records`.
        backward: `auto`, `single_sample`, `per_sample`, `bookkeeping`, `two_pass` or `per_layer`.
        norms: `auto`, `direct` or `gram`: norm method of linear maps in `two_pass` and
            `bookkeeping`. `Sketch(...)` estimates norms there and in `per_layer`.
        accumulate: `fp32`, or `exact` for sums of integers: bitwise the same in every order.
        memory_budget: Bytes that `auto` may use beyond an ordinary backward pass; half of what is
            free now unless given.
        kernel: Per-sample arithmetic.
        noise: Noise source; a cryptographic stream with a fresh secret key unless given. Replicas
            need one key, and no other PrivateStep may have it.
        shards: Who holds the rest of each sample and parameter; by default everything is here.
        reduction: Sum over replicas, once per logical batch.
        on_release: Called with each `Release` before its noise exists; raising prevents it.
        first_step: Index of the first logical batch, after a restart.

    Raises:
        ValueError: If an argument is outside of its range.
        UnsupportedModelError: If a trainable module cannot be clipped per record.

    Guarantee:
        With one loss per record, adding or removing one record changes the sum before noise by at
        most `sensitivity` in L2 norm, up to fp32 rounding of the accumulated sum (none with
        `accumulate="exact"`), or as `Sketch` says; the noise on every coordinate is
        N(0, (σ·sensitivity)²) before division. Abadi et al. (2016), arXiv:1607.00133.

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
        clipping: Clipping,
        noise_multiplier: float,
        expected_batch_size: float,
        backward: str = "auto",
        norms: str | Sketch = "auto",
        accumulate: str = "fp32",
        memory_budget: float | None = None,
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
        self._shards, kernel = shards or LocalShards(), kernel or BlockedKernel()
        self._reduction, self._on_release = reduction or NoReduction(), on_release
        detach_copies(model)
        show_shards(model)  # a forward pass that no backward pass followed leaves some gathered
        owned = trainable_parameters(model)
        refuse_mixed_gradients(model, owned, self._shards, reduction)
        whole = self._shards.degree == 1 or isinstance(norms, Sketch)
        may_tap = backward != "single_sample" and whole
        modules = list(owned_modules(model, kernel if may_tap else None))
        groups = clipping.resolve({name: p.numel() for name, p in owned.items()})
        self._mechanism = GaussianMechanism(
            noise or own_noise(reduction, self.noise_multiplier, self._shards, owned),
            noise_multiplier=self.noise_multiplier,
            expected_batch_size=self.expected_batch_size,
            adaptive=clipping.adaptive,
            norms=norms.law(clipping, groups) if isinstance(norms, Sketch) else None,
        )
        wishes = Wishes(backward=backward, norms=norms, memory_budget=memory_budget)
        self._plan = plan = plan_for(model, modules, groups, wishes, self._shards, kernel)
        accumulator = accumulator_named(
            accumulate, clip_norm=clipping.clip_norm, expected_batch_size=expected_batch_size
        )
        sums = ClippedSum(owned, self._shards, accumulator, kernel, in_parts=plan.adds_in_parts)
        self._attachment = Attachment(
            model,
            owned,
            modules if self._plan.may_tap else (),
            tapped=self._plan.tapped,
            begin=partial(require_agreement, sums.together),
        )
        self._work = Workspace(
            attachment=self._attachment,
            groups=groups,
            shards=self._shards,
            sums=sums,
            measure=self._plan.measure(owned, self._shards),
        )
        self._entered, self._attached = False, True

    def __enter__(self) -> Self:
        """Begin a logical batch."""
        if not self._attached:
            raise PrivacyError("This PrivateStep was detached from its model; build a new one.")
        if self._entered:
            raise PrivacyError("This PrivateStep is already inside a `with` block; leave it first.")
        self._attachment.require_same_parameters()
        self._attachment.require_no_gradients("before the logical batch", CLEAR_GRADIENTS)
        self._entered = True
        self._begin()
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
                self._attachment.require_whole_batch()
                self._release()
        except BaseException:
            self._work.discard()
            raise
        if kind is not None:
            self._work.discard()

    def backward(self, losses_B: Tensor, is_record_B: Tensor | None = None) -> None:
        """Add the clipped gradients of one micro-batch to the logical batch.

        Args:
            losses_B: One loss per record, `[B]`, floating point; B may be 0. Under context
                parallelism this rank's share of each loss.
            is_record_B: Which rows are records of the draw, `[B]`, bool; the others fill the
                micro-batch, add exactly nothing, and are not counted. None for all of them.

        Raises:
            PrivacyError: If called outside of `with step:`, if the losses are not one per record,
                if a loss depends on another record, or if a gradient reached a parameter around
                its module.
        """
        if not self._entered:
            raise PrivacyError(
                "step.backward was called outside of `with step:`; one block is one logical batch."
            )
        batch = self._attachment.micro_batch
        check_losses(losses_B, batch.size if batch else None)
        if is_record_B is not None:
            losses_B = records_only(losses_B, is_record_B)
        if len(losses_B) == 0:
            self._attachment.end_micro_batch()
            return
        self._work.is_record_B = is_record_B
        try:
            run_micro_batch(self._work, losses_B)
        except BaseException:
            self._attachment.broken = True  # part of it may be in the sum already
            raise
        finally:
            self._attachment.end_micro_batch()

    def probe(self, losses_B: Tensor) -> None:
        """Test on a forward pass of its own that no loss reaches another record; add nothing.

        Else `backward` does so, on a graph that selective checkpointing lets be used once.

        Args:
            losses_B: One loss per record, `[B]`, computed inside `with step:`.

        Raises:
            PrivacyError: If the last loss depends on another record.
        """
        check_losses(losses_B)
        try:
            probe(self._work, losses_B)
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
    def sensitivity(self) -> float:
        """√ΣC_m² of the current logical batch: L2 sensitivity of the clipped sum."""
        return self._work.groups.sensitivity

    @property
    def takes_single_samples(self) -> bool:
        """Whether every micro-batch must hold one record."""
        return not self._plan.may_tap

    def path_of(self, parameter: nn.Parameter) -> str:
        """Return the rule that produces this parameter's norm, or the strategy that needs none."""
        return self._plan.path_of(parameter)

    def best_microbatch(self, length: int, most: int) -> int:
        """Return the smallest micro-batch, in records, that is about as fast as any.

        Args:
            length: Tokens of each record.
            most: Largest micro-batch that the caller can hold: activations are the caller's.
        """
        return self._plan.best_microbatch(length, most)

    def explain(self) -> str:
        """Return the strategies in use, with the reasons, and the path of each trainable module."""
        shapes = {site.name: site.last_shape for site in self._attachment.sites}
        return explain(self._plan, {n: math.prod(shape[1:-1]) for n, shape in shapes.items()})

    def detach(self) -> None:
        """Undo every patch: the model is the user's own again."""
        self._attachment.detach()
        self._work.buffers.clear()
        self._attached = False

    def state_dict(self) -> dict[str, Any]:
        """Return what a restart needs: the next step and the thresholds; nothing is secret."""
        return {"next_step": self.next_step, "clip_norms": self._work.groups.thresholds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken, under a noise that has not come so far.

        Raises:
            PrivacyError: If the step is inside a `with` block, or the groups are not the same.
        """
        if self._entered:
            raise PrivacyError("load_state_dict was called inside of `with step:`; leave it first.")
        self._work.groups = with_thresholds(self._work.groups, state["clip_norms"])
        self.next_step = int(state["next_step"])

    def _begin(self) -> None:
        work, groups = self._work, self._work.groups
        work.sums.begin({name: groups.clip_norms[m] for name, m in groups.index.items()})
        if self.clipping.adaptive is not None:
            device = next(iter(self._attachment.owned.values())).device
            work.within_M = torch.zeros(len(groups), dtype=torch.float64, device=device)
        self._attachment.activate(True)

    def _release(self) -> None:
        """Announce, add noise, divide; then let adaptive thresholds move for the next batch."""
        work = self._work
        require_agreement(work.sums.together, -1 - work.sums.order)  # no size of a micro-batch
        release = self._mechanism.announce(self.next_step, work.groups)
        reduce_alike(work, self._reduction, release, self._mechanism)
        if self._on_release is not None:
            self._on_release(release)
        self.next_step += 1
        for name, parameter in self._attachment.owned.items():
            offset = self._shards.offset(parameter)
            mean = self._mechanism.noisy_mean(release, name, work.sums.take(name), offset=offset)
            local = mean.to(self._shards.local(parameter).dtype)
            parameter.grad = self._shards.restore(parameter, local)
        if work.within_M is not None:
            work.groups = self._mechanism.next_groups(release, work.groups, work.within_M)
