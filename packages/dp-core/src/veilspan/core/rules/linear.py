"""Linear maps: `y = x Wᵀ + b` of torch and `y = x W + b` of Hugging Face's Conv1D."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from veilspan.core.contributions import OuterProducts, RowSums
from veilspan.core.protocols import NormKernel
from veilspan.core.rules.base import Gradients
from veilspan.core.rules.probe import (
    agrees,
    differentiates_as,
    own_parameters,
    probe_input,
    probed,
)


@dataclass(frozen=True, kw_only=True)
class LinearRule:
    """Rule of a module that computes `x Wᵀ + b`, or `x W + b` when `transposed`."""

    kernel: NormKernel
    transposed: bool = False

    @property
    def name(self) -> str:
        """Family name."""
        return "linear (transposed)" if self.transposed else "linear"

    def saved_input(self, inputs: Tensor, output: Tensor) -> Tensor:
        """Keep the input in the dtype of the product, which autocast may have lowered."""
        return inputs.to(output.dtype)

    def backward(
        self, module: nn.Module, inputs: Tensor, grad_output: Tensor, *, needs_input: bool
    ) -> Gradients:
        """Return `g W`, or `g Wᵀ`; the outer products of the weight, the row sums of the bias."""
        grad_input = None
        if needs_input:
            matrix: Tensor = module.weight  # pyright: ignore[reportAssignmentType]
            matrix = matrix.to(grad_output.dtype)
            grad_input = grad_output @ (matrix.mT if self.transposed else matrix)
        act_BTI = inputs.reshape(inputs.shape[0], -1, inputs.shape[-1])
        grad_BTO = grad_output.reshape(grad_output.shape[0], -1, grad_output.shape[-1])
        pair = (grad_BTO, act_BTI) if self.transposed else (act_BTI, grad_BTO)
        weight = OuterProducts(act_BTI=pair[0], grad_BTO=pair[1], kernel=self.kernel)
        return grad_input, {"weight": weight, "bias": RowSums(rows_BTn=grad_BTO)}


def linear_rule(module: nn.Module, kernel: NormKernel) -> LinearRule | None:
    """Return the rule when `module` computes a linear map of its last dimension, else None."""
    if type(module).forward is nn.Linear.forward:
        return LinearRule(kernel=kernel)
    own = own_parameters(module)
    if "weight" not in own or own["weight"].ndim != 2 or not set(own) <= {"weight", "bias"}:
        return None
    form = probed(module)
    for transposed in (False, True):
        rule = LinearRule(kernel=kernel, transposed=transposed)
        # Gradients also tell one form from the other where a weight is zero or symmetric.
        if _is_linear(form, transposed=transposed) and differentiates_as(module, rule):
            return rule
    return None


def _is_linear(module: nn.Module, *, transposed: bool) -> bool:
    own = own_parameters(module)
    weight, bias = own["weight"], own.get("bias")
    matrix = weight if transposed else weight.mT
    if bias is not None and bias.shape != matrix.shape[1:]:
        return False
    inputs = probe_input(weight, matrix.shape[0])
    return agrees(module, inputs, inputs @ matrix if bias is None else inputs @ matrix + bias)
