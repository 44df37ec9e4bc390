"""Size of a model and of one forward pass, counted on tensors that have shapes but no data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, PreTrainedTokenizerBase
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from veilspan.trainer.logits import chunks_logits
from veilspan.trainer.models import count_parameters, sketch_model
from veilspan.trainer.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """What the model of a recipe consists of and what one sequence costs.

    Attributes:
        parameters: All parameters; a tied one counts once.
        trainable: Parameters that are trained.
        parameter_bytes: Memory of all parameters.
        blocks: Number of repeated blocks.
        block_bytes: Memory of the parameters of the largest block.
        root_bytes: Memory of those outside of the blocks, such as embedding and head.
        sequence_length: Tokens of the counted sequence.
        hidden_size: Width of what flows between blocks.
        forward_flops: Arithmetic operations of one forward pass of the sequence.
        saved_bytes: Memory that its forward pass keeps for the backward pass, without logits.
        logits_bytes: Memory of its logits.
        chunked: Whether those never exist as a whole.
        element_bytes: Bytes of one number in forward and backward.
        linears: Sizes of the weight of each trained linear map.
    """

    parameters: int
    trainable: int
    parameter_bytes: int
    blocks: int
    block_bytes: int
    root_bytes: int
    sequence_length: int
    hidden_size: int
    forward_flops: int
    saved_bytes: int
    logits_bytes: int
    chunked: bool
    element_bytes: int
    linears: tuple[tuple[int, int], ...]


def count_cost(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> ModelCost:
    """Count the cost of a recipe's model for one full sequence; allocates nothing.

    Raises:
        ModelError: If the model cannot be built, or does not fit tokenizer and data.
    """
    length = recipe.data.sequence_length
    with torch.device("meta"):
        model = sketch_model(recipe, tokenizer, attn_implementation=_attention()).train()
    numbers, trainable = count_parameters(model)
    blocks = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
    logits, flops, saved = _forward(model, length, getattr(torch, recipe.model.dtype))
    config: Any = model.config
    return ModelCost(
        parameters=numbers,
        trainable=trainable,
        parameter_bytes=_bytes(model.parameters()),
        blocks=len(blocks),
        block_bytes=max(_bytes(block.parameters()) for block in blocks),
        root_bytes=_bytes(model.parameters()) - _bytes(blocks.parameters()),
        sequence_length=length,
        hidden_size=config.get_text_config().hidden_size,
        forward_flops=flops,
        saved_bytes=saved,
        logits_bytes=_bytes([logits]),
        chunked=chunks_logits(recipe, model),
        element_bytes=logits.element_size(),
        linears=tuple(_trained_linears(model)),
    )


def _forward(model: nn.Module, length: int, dtype: torch.dtype) -> tuple[Tensor, int, int]:
    """Return the logits of one sequence, the operations and the bytes kept for the backward."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
    # On the meta device attention would take a path that keeps all scores; fake tensors pass as
    # CPU tensors and take the path that training takes.
    with FakeTensorMode(), saved_tensors_hooks(keep, lambda tensor: tensor), counter:
        weights = _cpu_copies(model, dtype)
        inputs = {"input_ids": torch.zeros(1, length, dtype=torch.int64), "use_cache": False}
        logits = functional_call(model, weights, kwargs=inputs).logits
    owned = {tensor.untyped_storage()._cdata for tensor in weights.values()}
    saved = (t.untyped_storage().nbytes() for number, t in kept.items() if number not in owned)
    return logits, counter.get_total_flops(), sum(saved)


def _cpu_copies(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    parameters = {
        name: torch.empty(parameter.shape, dtype=dtype, requires_grad=parameter.requires_grad)
        for name, parameter in model.named_parameters()
    }
    buffers = {
        name: torch.empty(buffer.shape, dtype=buffer.dtype)
        for name, buffer in model.named_buffers()
    }
    return parameters | buffers


def _attention() -> str:
    """Register the usual attention under a name for which transformers builds no mask.

    Under the usual name it builds a `[T, T]` mask as soon as tensors are fake, and only then.
    """
    name = "veilspan_forecast"
    AttentionInterface.register(name, sdpa_attention_forward)
    return name


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    # Several heads of queries may share one of keys, which torch's own formula learned in 2.12. The
    # kernel skips the half of the scores that a causal mask hides.
    batch, heads, length, width = query
    return batch * heads * length * key[2] * (width + value[3])


# torch counts attention on GPUs only.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
}


def _trained_linears(model: nn.Module) -> Iterator[tuple[int, int]]:
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Embedding) or not isinstance(weight, nn.Parameter):
            continue
        if weight.requires_grad and weight.ndim == 2:
            yield weight.shape[0], weight.shape[1]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
