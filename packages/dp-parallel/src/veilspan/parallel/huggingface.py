"""Context-parallel attention for unedited Hugging Face decoders."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from veilspan.parallel.active import current_region
from veilspan.parallel.attention import causal_attention

ATTENTION_NAME = "veilspan_context"
"""Value of `attn_implementation` that selects the registered attention."""

_UNSUPPORTED = {
    "softcap": "soft-capped scores",
    "position_bias": "a learned position bias",
    "s_aux": "attention sinks",
    "cu_seq_lens_q": "packed sequences",
    "cache": "a paged cache",
}


def register_attention() -> str:
    """Register the attention with Hugging Face under the name `"veilspan_context"`.

    Load or build the model with `attn_implementation=register_attention()`. No mask function is
    registered on purpose: transformers then builds no T × T mask, and does not take the positions
    of the zigzag layout for packed sequences. Hence a padding mask is not seen by the attention:
    fill sequences on the right, which causal attention never looks at.

    Returns:
        The name to pass as `attn_implementation`.

    Raises:
        ImportError: If transformers is not installed.

    Examples:
        >>> register_attention()
        'veilspan_context'
    """
    try:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    except ImportError as error:
        raise ImportError(
            "register_attention needs transformers; install veilspan-parallel[hf]."
        ) from error
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, attention_forward)
    return ATTENTION_NAME


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend within the sequence, in the signature that Hugging Face calls.

    Args:
        module: The attention layer.
        query: `[B, H, t, D]`, rotated.
        key: `[B, K, t, D]`, rotated; longer than the query when decoding with a cache.
        value: `[B, K, t, D]`.
        attention_mask: Must be None.
        **options: `scaling`, `sliding_window`, `dropout` and what else a layer passes.

    Returns:
        Output `[B, t, H, D]` and None in place of attention weights.

    Raises:
        ValueError: If the layer asks for something that would be computed wrongly.
    """
    _refuse(module, attention_mask, options)
    scale, window = options.get("scaling"), options.get("sliding_window")
    region = current_region()
    if region is None:
        output = causal_attention(query, key, value, scale=scale, window=window)
    else:
        _refuse_length(query, key, region.layout.tokens_per_rank)
        attend = region.strategy(heads=query.shape[1], key_heads=key.shape[1])
        output = attend(query, key, value, scale=scale, window=window)
    return output.transpose(1, 2).contiguous(), None


def _refuse(module: nn.Module, attention_mask: Tensor | None, options: dict[str, Any]) -> None:
    layer = type(module).__name__
    if attention_mask is not None:
        raise ValueError(
            f"{layer} was given an attention_mask; {ATTENTION_NAME} is causal and takes none: fill "
            "sequences on the right and set the labels there to the ignore index."
        )
    causal = options.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise ValueError(
            f"{layer} is bidirectional; {ATTENTION_NAME} is causal. Use a decoder-only model."
        )
    if options.get("dropout"):
        raise ValueError(
            f"{layer} asks for attention dropout {options['dropout']}; {ATTENTION_NAME} has none: "
            "set attention_dropout (GPT-2: attn_pdrop) to 0 in the model's configuration."
        )
    for name, meaning in _UNSUPPORTED.items():
        if options.get(name) is not None:
            raise ValueError(
                f"{layer} asks for {meaning} ({name}); {ATTENTION_NAME} does not compute that: "
                "switch it off in the model's configuration or use another attn_implementation."
            )


def _refuse_length(query: Tensor, key: Tensor, tokens_per_rank: int) -> None:
    if query.shape[2] != tokens_per_rank or key.shape[2] != tokens_per_rank:
        raise ValueError(
            f"attention got {query.shape[2]} queries and {key.shape[2]} keys inside "
            f"context_parallel, whose layout gives each rank {tokens_per_rank} tokens; pass the "
            "part that shard_batch returns, and no key cache (use_cache=False)."
        )
