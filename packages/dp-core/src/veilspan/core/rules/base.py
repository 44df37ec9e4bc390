"""What a layer rule must answer; one rule object serves one module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor, nn

from veilspan.core.contributions import Contribution

InputGradient = Tensor | Callable[[], Tensor] | None
"""Gradient of the input; a function where forming a contribution yields it on the way.

The function is called once the pass that is running has taken what it wants of the contributions.
"""

Gradients = tuple[InputGradient, Mapping[str, Contribution]]
"""Gradient of the input, and by parameter name what one use adds to each sample's gradient."""


class Rule(Protocol):
    """Gradient of a layer by hand: input gradient plus per-sample parameter gradients."""

    @property
    def name(self) -> str:
        """Short name of the layer family, for the report."""
        ...

    def saved_input(self, inputs: Tensor, output: Tensor) -> Tensor:
        """Return the form of the input to keep for the backward pass."""
        ...

    def backward(
        self, module: nn.Module, inputs: Tensor, grad_output: Tensor, *, needs_input: bool
    ) -> Gradients:
        """Return the gradients of one use of the module.

        Args:
            module: The module.
            inputs: What `saved_input` kept.
            grad_output: Gradient of the output.
            needs_input: Whether the input's gradient is wanted, shaped and typed like it; None may
                stand for it otherwise.
        """
        ...
