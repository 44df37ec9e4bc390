"""What a layer rule must answer; one rule object serves one module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from veilspan.core.contributions import Contribution


class Rule(Protocol):
    """Gradient of a layer by hand: input gradient plus per-sample parameter gradients."""

    @property
    def name(self) -> str:
        """Short name of the layer family, for the report."""
        ...

    def saved_input(self, inputs: Tensor, output: Tensor) -> Tensor:
        """Return the form of the input to keep for the backward pass."""
        ...

    def input_grad(self, module: nn.Module, inputs: Tensor, grad_output: Tensor) -> Tensor | None:
        """Return the gradient of the input, shaped and typed like it."""
        ...

    def contributions(
        self, module: nn.Module, inputs: Tensor, grad_output: Tensor
    ) -> Mapping[str, Contribution]:
        """Return, by parameter name, what this use adds to each sample's gradient."""
        ...
