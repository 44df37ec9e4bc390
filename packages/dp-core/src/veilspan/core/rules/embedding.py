"""Embedding tables, with or without a constant scale on the looked-up rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veilspan.core.contributions import Lookups
from veilspan.core.errors import UnsupportedModelError
from veilspan.core.protocols import NormKernel
from veilspan.core.rules.base import Gradients
from veilspan.core.rules.probe import rounding_of, run


@dataclass(frozen=True, kw_only=True)
class EmbeddingRule:
    """Rule of a module that computes `scale · W[ids]`."""

    kernel: NormKernel
    scale: float = 1.0
    name: str = "embedding"

    def saved_input(self, inputs: Tensor, output: Tensor) -> Tensor:
        """Keep the token ids."""
        return inputs

    def backward(
        self, module: nn.Module, inputs: Tensor, grad_output: Tensor, *, needs_input: bool
    ) -> Gradients:
        """Return no gradient of token ids; the looked-up rows, without those of `padding_idx`."""
        ids_BT = inputs.reshape(inputs.shape[0], -1)
        grad_BTD = grad_output.reshape(*ids_BT.shape, grad_output.shape[-1])
        if self.scale != 1.0:
            grad_BTD = grad_BTD * self.scale
        padding = getattr(module, "padding_idx", None)
        if padding is not None:
            grad_BTD = grad_BTD.masked_fill((ids_BT == padding)[..., None], 0.0)
        assert isinstance(module, nn.Embedding)
        rows, kernel = len(module.weight), self.kernel
        found = Lookups(ids_BT=ids_BT, grad_BTD=grad_BTD, rows=rows, kernel=kernel)
        return None, {"weight": found}


def embedding_rule(module: nn.Module, name: str, kernel: NormKernel) -> EmbeddingRule | None:
    """Return the rule when `module` is an embedding, else None.

    Raises:
        UnsupportedModelError: If the embedding has an option that couples records or writes to the
            table outside of the mechanism.
    """
    if not isinstance(module, nn.Embedding):
        return None
    for option in ("max_norm", "scale_grad_by_freq", "sparse"):
        if getattr(module, option, None):
            raise UnsupportedModelError(
                f"Embedding '{name}' has {option}={getattr(module, option)!r}, which changes the "
                f"table or its gradient outside of clipping. Set {option} to its default."
            )
    if type(module).forward is nn.Embedding.forward:
        return EmbeddingRule(kernel=kernel)
    scale = _scale(module)
    return None if scale is None else EmbeddingRule(kernel=kernel, scale=scale)


def _scale(module: nn.Embedding) -> float | None:
    """Return s when the module computes s·W[ids], else None."""
    ids = torch.arange(min(8, module.num_embeddings), device=module.weight.device)[None]
    output = run(module, ids)
    rows = module.weight.detach()[ids].double()
    if output is None or output.shape != rows.shape or not rows.any():
        return None
    output = output.double()
    scale = float((output * rows).sum() / rows.square().sum())
    error = (output - scale * rows).abs().max()
    return scale if error <= rounding_of(module.weight.dtype) * output.abs().max() else None
