"""The tap: where the backward pass of a layer hands over what privacy needs of it.

Every trainable leaf module runs through one `autograd.Function`. Its backward returns the input
gradient as usual and nothing for the weight; input and output gradient, the two factors of every
per-sample gradient, go to the pass that is running. Autograd never forms a weight gradient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from veilspan.core.contributions import Contribution
from veilspan.core.errors import PrivacyError
from veilspan.core.rules.base import Rule


class Pass(Protocol):
    """What one backward pass wants of the layers."""

    def receive(self, site: Site, inputs: Tensor, grad_output: Tensor) -> None:
        """Take what one use of a module adds to the gradients of its parameters."""
        ...


@dataclass
class MicroBatch:
    """One micro-batch on its way: how often each parameter is used, and the pass that is running.

    Args:
        size: Records B.
        strategy: Name of the backward strategy.
        device: Where the model is.
    """

    size: int
    strategy: str
    device: torch.device
    uses: Counter[str] = field(default_factory=Counter)
    running: Pass | None = None
    anchor: Tensor = field(init=False)

    def __post_init__(self) -> None:
        # An input that needs a gradient, so that autograd visits layers whose input needs none.
        self.anchor = torch.zeros((), device=self.device, requires_grad=True)

    def differentiate(self, loss: Tensor, wanted: Pass, *, keep_graph: bool = False) -> None:
        """Run one backward pass of `loss` whose taps hand over to `wanted`."""
        self.running = wanted
        loss.backward(retain_graph=keep_graph)


@dataclass
class Site:
    """One patched module: its rule, its trainable parameters, and the way to the micro-batch.

    Args:
        name: Module path.
        module: The module.
        rule: Its gradients by hand.
        owned: Name in the model of each trainable parameter, by its name in the module.
        micro_batch: Returns the micro-batch that a call belongs to; None to pass it through.
        forward: The module's own forward.
    """

    name: str
    module: nn.Module
    rule: Rule
    owned: dict[str, str]
    micro_batch: Callable[[Tensor], MicroBatch | None]
    forward: Callable[..., Any]
    last_shape: tuple[int, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module; through its tap while a tapped micro-batch is in progress."""
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
            batch.uses.update(self.owned.values())
        return TapFunction.apply(self, batch, inputs, batch.anchor)

    def parts(self, inputs: Tensor, grad_output: Tensor) -> Iterator[tuple[str, Contribution]]:
        """Yield what one use adds to each trainable parameter, by name in the model."""
        found = self.rule.contributions(self.module, inputs, grad_output)
        return ((name, found[local]) for local, name in self.owned.items())

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
    """Forward of the module itself; backward that hands over instead of forming its gradient."""

    @staticmethod
    def forward(ctx: Any, site: Site, batch: MicroBatch, inputs: Tensor, anchor: Tensor) -> Tensor:
        """Return the module's own output for `inputs`."""
        output = site.forward(inputs)
        ctx.site, ctx.batch = site, batch
        ctx.save_for_backward(site.rule.saved_input(inputs, output))
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        """Hand over both factors to the running pass, and return the input gradient."""
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
        batch.running.receive(site, inputs, grad_output)
        return None, None, grad_input, None
