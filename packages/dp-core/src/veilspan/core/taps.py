"""The tap: where the backward pass of a layer hands over what privacy needs of it.

Every trainable leaf module runs through one `autograd.Function`. Its backward returns the input
gradient as usual and nothing for the weight; input and output gradient, the two factors of every
per-sample gradient, go to the pass that is running. Autograd never forms a weight gradient.

In a compiled graph the hand-over is an opaque operator, so that the graph has no break: forward
passes are compiled as they are, the layer's own backward runs between compiled parts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from veilspan.core import compiled
from veilspan.core.checks import refuse_other_parameters
from veilspan.core.contributions import Contribution
from veilspan.core.errors import PrivacyError
from veilspan.core.micro_batch import MicroBatch, Pass, Progress
from veilspan.core.norms import few_numbers
from veilspan.core.rules.base import Rule


@dataclass(kw_only=True)
class Site(ABC):
    """One patched module: its trainable parameters, and the way to the micro-batch.

    Args:
        name: Module path.
        module: The module.
        owned: Name in the model of each trainable parameter, by its name in the module.
        progress: Who knows the micro-batch in progress.
        forward: The module's own forward.
        calls: Forward passes through the tap in this micro-batch, int64 on the CPU; a tensor,
            because compiled code counts as well.
    """

    name: str
    module: nn.Module
    owned: dict[str, str]
    progress: Progress
    forward: Callable[..., Any]
    calls: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    last_shape: tuple[int, ...] = ()
    number: int = field(init=False)

    def __post_init__(self) -> None:
        self.number = compiled.number_of(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module; through its tap while a tapped micro-batch is in progress."""
        first = next((v for v in (*args, *kwargs.values()) if torch.is_tensor(v)), None)
        batch = None if first is None else self.progress.batch_of(first)
        if batch is None:
            return self.forward(*args, **kwargs)
        self.calls.add_(1)
        return self.tapped(batch, *args, **kwargs)

    @abstractmethod
    def tapped(self, batch: MicroBatch, *args: Any, **kwargs: Any) -> Any:
        """Run the module through its tap.

        Raises:
            PrivacyError: If the records of the micro-batch are not dimension 0 of the input.
        """

    def running_pass(self, anchor: Tensor) -> Pass:
        """Return the pass that is running.

        Args:
            anchor: The anchor that this use's forward pass had.

        Raises:
            PrivacyError: If somebody else than the step differentiates, or a loss reaches back into
                an earlier micro-batch.
        """
        batch = self.progress.micro_batch
        if batch is None or batch.running is None:
            raise PrivacyError(
                "A backward pass ran outside of step.backward(losses_B). Inside `with step:` only "
                "step.backward may differentiate the model, because it alone clips."
            )
        if batch.anchor.data_ptr() != anchor.data_ptr():
            raise PrivacyError(
                f"A loss reaches back into module '{self.name}' as an earlier micro-batch called "
                "it, so one loss would hold gradients of other records. Detach what is carried "
                "from one micro-batch to the next."
            )
        return batch.running

    def refuse_shape(self, inputs: Tensor, size: int, *, ndim: int | None = None) -> NoReturn:
        """Refuse an input whose dimension 0 is not the records.

        Raises:
            PrivacyError: Naming the module, the shape, and the ways out.
        """
        wanted = "two dimensions or more" if ndim is None else f"{ndim} dimensions"
        raise PrivacyError(
            f"Module '{self.name}' received an input of shape {tuple(inputs.shape)} in a "
            f"micro-batch of {size} records. It needs {wanted}, and dimension 0 must be the "
            f"records ({size}, or 1 to broadcast): where records are flattened or moved, tokens "
            "would be clipped instead. Keep the batch dimension first; or let the module around it "
            "that still has the records first run them one at a time, "
            "register_rule(type(that_module), RecordsAlone()); or use backward='single_sample'."
        )


@dataclass(kw_only=True)
class FactorSite(Site):
    """A patched layer whose per-sample gradients follow from its input and output gradient.

    Args:
        rule: Its gradients by hand.
    """

    rule: Rule
    _own: dict[str, nn.Parameter | None] = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        own = self.module._parameters  # FSDP exchanges those that are split
        self._own = {name: p for name, p in own.items() if not isinstance(p, DTensor)}

    def tapped(self, batch: MicroBatch, *args: Any, **kwargs: Any) -> Any:
        """Run the layer; its one input is saved as the rule wants it.

        Raises:
            PrivacyError: If it has another parameter than its own, or another number of inputs.
        """
        given = [*args, *kwargs.values()]
        if len(given) != 1:
            raise PrivacyError(
                f"Module '{self.name}' was called with {len(given)} arguments; its rule takes the "
                "input alone. Call it so, register_rule(its type, RecordsAlone), or use "
                "backward='single_sample'."
            )
        inputs = self._samples_first(given[0], batch.size)
        if not torch.compiler.is_compiling():
            refuse_other_parameters(self.name, self._own, self.module)
            return _Tap.apply(self, inputs, batch.anchor)
        with torch.no_grad():
            output = self.forward(inputs)
        saved = self.rule.saved_input(inputs.detach(), output)
        return compiled.TracedTap.apply(output, inputs, batch.anchor, saved, self.number)

    def hand_over(
        self, running: Pass, inputs: Tensor, grad_output: Tensor, *, needs_grad: bool
    ) -> Tensor | None:
        """Give both factors to the running pass, and return the input gradient if it is needed."""
        self.last_shape = tuple(inputs.shape)
        grad_input, found = self.rule.backward(
            self.module, inputs, grad_output, needs_input=needs_grad
        )
        running.receive(FactorUse(self, found, inputs, grad_output))
        if not needs_grad:
            return None
        return grad_input() if callable(grad_input) else grad_input

    def _samples_first(self, inputs: Tensor, size: int) -> Tensor:
        if inputs.ndim >= 2:
            if inputs.shape[0] == size:
                return inputs
            if inputs.shape[0] == 1:  # positions shared by the batch, as in GPT-2
                return inputs.expand(size, *inputs.shape[1:])
        self.refuse_shape(inputs, size)


@dataclass(frozen=True)
class FactorUse:
    """One use of a layer with a rule: what it adds to each parameter, and its output gradient."""

    site: FactorSite
    found: Mapping[str, Contribution]
    inputs: Tensor
    grad_output: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which the gradients of all samples at once would be formed."""
        return self.grad_output.dtype

    def parts(self) -> Iterator[tuple[str, Contribution]]:
        """Yield what this use adds to each trainable parameter, by name in the model."""
        return ((name, self.found[local]) for local, name in self.site.owned.items())

    def reached(self) -> Tensor:
        """Return the samples whose output gradient is neither zero nor 0 · inf, `[B]` bool."""
        return ((self.grad_output != 0) & self.grad_output.isfinite()).flatten(1).any(1)

    def sq_size(self, b: int) -> Tensor:
        """Return the squared norm of the output gradient of sample `b`, fp64 scalar."""
        return torch.linalg.vector_norm(self.grad_output[b], dtype=torch.float64).square()

    def glimpse(self) -> dict[str, Tensor]:
        """Return a few numbers of each sample's input and output gradient, `[B, n]`."""
        kind = "input" if self.inputs.is_floating_point() else "ids"
        return {kind: few_numbers(self.inputs), "gradient": few_numbers(self.grad_output)}


class _Tap(torch.autograd.Function):
    """Forward of the module itself; backward that hands over instead of forming its gradient."""

    @staticmethod
    def forward(ctx: Any, site: FactorSite, inputs: Tensor, anchor: Tensor) -> Tensor:
        """Return the module's own output for `inputs`."""
        output = site.forward(inputs)
        ctx.site, ctx.anchor = site, anchor
        ctx.save_for_backward(site.rule.saved_input(inputs, output))
        shared = output.untyped_storage().data_ptr() == inputs.untyped_storage().data_ptr()
        return compiled.no_view(output) if output._is_view() and not shared else output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        """Hand over both factors to the running pass, and return the input gradient."""
        (inputs,) = ctx.saved_tensors
        site, needs_grad = ctx.site, ctx.needs_input_grad[1]
        running = site.running_pass(ctx.anchor)
        return None, site.hand_over(running, inputs, grad_outputs[0], needs_grad=needs_grad), None
