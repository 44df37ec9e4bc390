"""What a model's configuration asks for and context parallelism cannot give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from veilspan.parallel.attention import AttentionName, choose
from veilspan.parallel.huggingface import ATTENTION_NAME
from veilspan.parallel.layout import Layout
from veilspan.parallel.mesh import ParallelMesh

TESTED_MODEL_TYPES = (
    "gemma",
    "gemma3_text",
    "gpt2",
    "llama",
    "mistral",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
)
"""Values of `config.model_type` whose losses and gradients are tested against one process."""

_LAYER_TYPES = ("full_attention", "sliding_attention")
_LOCAL_ROPE = ("dynamic", "longrope")
_DROPOUT = ("attention_dropout", "attn_pdrop")


def check_model(
    config: Any,
    mesh: ParallelMesh,
    layout: Layout,
    *,
    attention: AttentionName = "auto",
    allow_untested: bool = False,
) -> None:
    """Raise if the model cannot be trained on this mesh with this layout; call it before training.

    Args:
        config: A Hugging Face model configuration, or anything with the same attributes.
        mesh: The processes.
        layout: Who holds which tokens.
        attention: The attention to be used.
        allow_untested: Accept a `model_type` outside `TESTED_MODEL_TYPES`, for models that take
            `position_ids` and call attention through Hugging Face's registry.

    Raises:
        ValueError: With all reasons, each naming the setting, its value, and the way out.
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    reasons = list(_length_reasons(config, layout))
    if mesh.context_degree > 1:
        reasons += _model_reasons(config, allow_untested)
        reasons += _attention_reasons(config)
        reasons += _rope_reasons(config)
        reasons += _head_reasons(config, mesh.context_degree, attention)
    if reasons:
        raise ValueError(
            f"{getattr(config, 'model_type', 'this model')} cannot be trained on "
            f"{mesh.context_degree} context rank(s):\n- " + "\n- ".join(reasons)
        )


def _length_reasons(config: Any, layout: Layout) -> Iterator[str]:
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and layout.length > longest:
        yield (
            f"the sequence length is {layout.length} but max_position_embeddings is {longest}; use "
            "shorter sequences or a model made for longer ones."
        )


def _model_reasons(config: Any, allow_untested: bool) -> Iterator[str]:
    model_type = getattr(config, "model_type", None)
    if model_type not in TESTED_MODEL_TYPES and not allow_untested:
        yield (
            f"model_type is {model_type!r}; tested are {', '.join(TESTED_MODEL_TYPES)}. Compare "
            "one loss with a single process and pass allow_untested=True, or use context=1."
        )
    implementation = getattr(config, "_attn_implementation", None)
    if implementation != ATTENTION_NAME:
        yield (
            f"attn_implementation is {implementation!r}, which would attend to local tokens only; "
            "load the model with attn_implementation=register_attention()."
        )


def _attention_reasons(config: Any) -> Iterator[str]:
    if getattr(config, "use_bidirectional_attention", None):
        yield "use_bidirectional_attention is on; only causal attention is supported: unset it."
    if getattr(config, "attn_logit_softcapping", None):
        yield (
            f"attn_logit_softcapping is {config.attn_logit_softcapping}; capped scores are not "
            "supported: set it to None, or use context=1."
        )
    for name in _DROPOUT:
        if getattr(config, name, None):
            yield f"{name} is {getattr(config, name)}; scores cannot be dropped: set it to 0."
    for layer_type in sorted(set(getattr(config, "layer_types", None) or ()) - set(_LAYER_TYPES)):
        yield (
            f"layer_types contains {layer_type!r}; supported are {', '.join(_LAYER_TYPES)}: use "
            "another model, or context=1."
        )


def _rope_reasons(config: Any) -> Iterator[str]:
    for rope_type in sorted(_rope_types(getattr(config, "rope_parameters", None))):
        if rope_type in _LOCAL_ROPE:
            yield (
                f"the rope type is {rope_type!r}, which depends on the largest position a rank "
                "holds; use 'default', 'linear', 'yarn' or 'llama3'."
            )


def _rope_types(parameters: Any) -> set[str]:
    """Return the rope types of a configuration, whose parameters may be given per layer type."""
    if not isinstance(parameters, Mapping):
        return set()
    own = parameters.get("rope_type", parameters.get("type"))
    types = {own} if isinstance(own, str) else set()
    return types.union(*(_rope_types(value) for value in parameters.values()))


def _head_reasons(config: Any, ranks: int, attention: AttentionName) -> Iterator[str]:
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    try:
        choose(attention, heads=heads, key_heads=key_heads, ranks=ranks)
    except ValueError as error:
        yield str(error)
