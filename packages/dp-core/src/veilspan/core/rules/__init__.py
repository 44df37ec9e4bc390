"""Layer rules: gradients by hand of the layers that a transformer is made of."""

from __future__ import annotations

from torch import nn

from veilspan.core.protocols import NormKernel
from veilspan.core.rules.base import Rule
from veilspan.core.rules.embedding import embedding_rule
from veilspan.core.rules.linear import linear_rule
from veilspan.core.rules.norm import norm_rule

__all__ = ["Rule", "find_rule"]


def find_rule(name: str, module: nn.Module, kernel: NormKernel) -> Rule | None:
    """Return the rule that gives per-sample gradients of `module`, or None when no rule does.

    Args:
        name: Module path, for messages.
        module: A module that owns trainable parameters.
        kernel: Arithmetic of linear maps.

    Raises:
        UnsupportedModelError: If the module has an option that breaks per-record clipping.
    """
    return embedding_rule(module, name) or linear_rule(module, kernel) or norm_rule(module)
