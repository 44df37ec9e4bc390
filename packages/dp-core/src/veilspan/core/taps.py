"""The tap: a zero-storage leaf whose gradient is what a layer adds to privacy's arithmetic.

Every trainable leaf module runs through one `autograd.Function`. Its backward returns the input
gradient as usual, nothing for the weight, and for its taps the quantity that the running pass
wants. Autograd adds up the uses of a parameter, so tied weights are summed before any norm.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veilspan.core.errors import PrivacyError
from veilspan.core.rules.base import Rule


class Pass(enum.Enum):
    """What a backward pass wants of the taps."""

    PROBE = "which samples a loss reaches"
    PER_SAMPLE = "per-sample gradients"
    NORM = "squared norms"
    SUM = "clipped sums"


@dataclass
class MicroBatch:
    """Taps of one micro-batch of `size` samples, plus what the running pass needs to fill them."""

    size: int
    strategy: str
    owned: dict[int, nn.Parameter]
    norm_method: Callable[[int, int, int], str]
    uses: Counter[int] = field(default_factory=Counter)
    running: Pass | None = None
    factor_B: Tensor | None = None
    reached_B: dict[str, Tensor] = field(default_factory=dict)
    norm_tap: Tensor = field(init=False)
    sample_taps: dict[int, Tensor] = field(init=False)
    sum_taps: dict[int, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.norm_tap = _leaf((self.size,), next(iter(self.owned.values())), torch.float64)
        self.sample_taps = {
            key: _leaf((self.size, *p.shape), p, p.dtype) for key, p in self.owned.items()
        }
        self.sum_taps = {
            key: _leaf(p.shape, p, torch.promote_types(p.dtype, torch.float32))
            for key, p in self.owned.items()
        }

    def wants_sample(self, key: int) -> bool:
        """Return whether the running pass forms this parameter's per-sample gradient.

        A parameter that is used more than once needs it even for its norm: the norm of a sum is
        not the sum of the norms.
        """
        shared = self.running is Pass.NORM and self.uses[key] > 1
        return shared or self.running is Pass.PER_SAMPLE

    def differentiate(self, loss: Tensor, wanted: Pass, *, keep_graph: bool = False) -> None:
        """Run one backward pass of `loss` that fills the taps with what `wanted` names."""
        self.running = wanted
        loss.backward(retain_graph=keep_graph)


def _leaf(shape: Iterable[int], like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a leaf of zeros that takes no memory whatever its shape."""
    zero = torch.zeros((), dtype=dtype, device=like.device)
    return zero.expand(*shape).detach().requires_grad_()


@dataclass
class Site:
    """One patched module: its rule, its trainable parameters, and the way to the micro-batch."""

    name: str
    module: nn.Module
    rule: Rule
    parameters: dict[str, nn.Parameter]
    micro_batch: Callable[[Tensor], MicroBatch | None]
    forward: Callable[..., Any]
    last_shape: tuple[int, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module; through its taps while a tapped micro-batch is in progress."""
        given = [*args, *kwargs.values()]
        batch = self.micro_batch(given[0]) if given and torch.is_tensor(given[0]) else None
        if batch is None:
            return self.forward(*args, **kwargs)
        if len(given) != 1:
            raise PrivacyError(
                f"Module '{self.name}' was called with {len(given)} arguments; a tapped module "
                "takes its input alone. Call it so, or use backward='single_sample'."
            )
        inputs = self._samples_first(given[0], batch.size)
        self.last_shape = tuple(inputs.shape)
        if batch.running is None:  # a recomputed forward of activation checkpointing is no new use
            batch.uses.update(id(p) for p in self.parameters.values())
        taps = [
            tap
            for p in self.parameters.values()
            for tap in (batch.sample_taps[id(p)], batch.sum_taps[id(p)])
        ]
        return TapFunction.apply(self, batch, inputs, batch.norm_tap, *taps)

    def _samples_first(self, inputs: Tensor, size: int) -> Tensor:
        if inputs.ndim >= 2:
            if inputs.shape[0] == size:
                return inputs
            if inputs.shape[0] == 1:  # positions shared by the batch, as in GPT-2
                return inputs.expand(size, *inputs.shape[1:])
        raise PrivacyError(
            f"Module '{self.name}' received an input of shape {tuple(inputs.shape)} in a "
            f"micro-batch of {size} records. It needs two dimensions or more, and dimension 0 must "
            f"be the records ({size}, or 1 to broadcast): where records are flattened or moved, "
            "tokens would be clipped instead. Keep the batch dimension first, or use "
            "backward='single_sample'."
        )


class TapFunction(torch.autograd.Function):
    """Forward of the module itself; backward that fills its taps, not its weight gradient."""

    @staticmethod
    def forward(ctx: Any, site: Site, batch: MicroBatch, inputs: Tensor, *taps: Tensor) -> Tensor:
        """Return the module's own output for `inputs`."""
        output = site.forward(inputs)
        ctx.site, ctx.batch = site, batch
        ctx.save_for_backward(site.rule.saved_input(inputs, output))
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        """Return the input gradient and what the running pass wants of each tap."""
        (grad_output,) = grad_outputs
        site, batch = ctx.site, ctx.batch
        (inputs,) = ctx.saved_tensors
        if batch.running is None:
            raise PrivacyError(
                "A backward pass ran outside of step.backward(losses_B). Inside `with step:` only "
                "step.backward may differentiate the model, because it alone clips."
            )
        grad_input = None
        if ctx.needs_input_grad[2]:
            grad_input = site.rule.input_grad(site.module, inputs, grad_output)
        return None, None, grad_input, *_tap_gradients(site, batch, inputs, grad_output)


def _tap_gradients(
    site: Site, batch: MicroBatch, inputs: Tensor, grad_output: Tensor
) -> tuple[Tensor | None, ...]:
    if batch.running is Pass.PROBE:
        reached_B = (
            ((grad_output != 0) & grad_output.isfinite()).flatten(1).any(1)
        )  # 0 · inf is NaN
        batch.reached_B[site.name] = batch.reached_B.get(site.name, False) | reached_B
        return (None,) * (1 + 2 * len(site.parameters))
    parts = site.rule.contributions(site.module, inputs, grad_output)
    sq_norm_B: Tensor | None = None
    filled: list[Tensor | None] = []
    for name, parameter in site.parameters.items():
        key, part = id(parameter), parts[name]
        sample = clipped = None
        if batch.wants_sample(key):
            sample = part.per_sample().to(batch.sample_taps[key].dtype)
        elif batch.running is Pass.NORM:
            own_B = part.sq_norms(batch.norm_method)
            sq_norm_B = own_B if sq_norm_B is None else sq_norm_B + own_B
        elif batch.running is Pass.SUM and batch.uses[key] == 1:
            assert batch.factor_B is not None
            clipped = part.weighted(batch.factor_B).to(batch.sum_taps[key].dtype)
        filled += [sample, clipped]
    return sq_norm_B, *filled
