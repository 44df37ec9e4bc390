"""Tiny models of every supported family, plus arithmetic that stays in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from veilspan.core.testing.oracle import Batch

VOCABULARY = 61
BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
    "use_cache": False,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": ("llama", BASE),
    "llama-tied": ("llama", BASE | {"tie_word_embeddings": True}),
    "llama-bias": ("llama", BASE | {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", BASE),
    "qwen3": ("qwen3", BASE | {"head_dim": 8, "attention_bias": True}),
    "mistral": ("mistral", BASE | {"sliding_window": 9}),
    "gemma": ("gemma", BASE | {"head_dim": 8}),
    "gemma3": ("gemma3_text", BASE | {"head_dim": 8, "sliding_window": 9}),
    "phi": ("phi", BASE),
    "phi3": ("phi3", BASE),
    "gpt2": ("gpt2", GPT2),
    "mixtral": ("mixtral", BASE),
    "qwen2_moe": ("qwen2_moe", BASE),
    "qwen3_moe": ("qwen3_moe", BASE),
}


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that was made; views and work in place make none."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        known = {leaf.untyped_storage().data_ptr() for leaf in tensors((args, kwargs))}
        for leaf in tensors(made):
            if leaf.untyped_storage().data_ptr() not in known:
                self.elements = max(self.elements, leaf.numel())
        return made


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@pytest.fixture
def largest() -> Largest:
    """Return a context that watches the sizes of tensors."""
    return Largest()


@pytest.fixture
def make_model() -> Callable[..., nn.Module]:
    """Return a builder of tiny decoders: `make_model("llama", dtype=torch.float64)`."""
    transformers = pytest.importorskip("transformers")

    def build(family: str, *, dtype: torch.dtype = torch.float64, **changes: object) -> nn.Module:
        kind, config = FAMILIES[family]
        settings = transformers.AutoConfig.for_model(kind, **(config | changes))
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(settings)
        with torch.no_grad():  # norms start at one, where an error of their gain would not show
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        return model.to(dtype).train()

    return build


@pytest.fixture
def make_batch() -> Callable[..., dict[str, Tensor]]:
    """Return a builder of token batches, every third label masked."""

    def build(size: int, length: int, *, seed: int = 1) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, VOCABULARY, (size, length), generator=generator)
        labels = ids.clone()
        labels[:, ::3] = -100
        return {"ids": ids, "labels": labels}

    return build


@pytest.fixture
def compute_losses() -> Callable[[nn.Module, Batch], Tensor]:
    """Return the loss of each record: mean cross entropy of its own next tokens."""

    def losses(model: nn.Module, batch: Batch) -> Tensor:
        logits = model(input_ids=batch["ids"]).logits
        labels = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
        tokens = (labels != -100).sum(1).clamp_min(1)
        entropy = F.cross_entropy(
            logits.transpose(1, 2), labels, reduction="none", ignore_index=-100
        )
        return entropy.sum(1) / tokens

    return losses


@pytest.fixture
def genuine_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep fp64 models in fp64 where their code asks for fp32, so that 1e-10 is a fair test."""
    to, softmax = Tensor.to, F.softmax

    def keep(dtype: object, value: Tensor) -> bool:
        return dtype is torch.float32 and value.dtype is torch.float64

    def wide_to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        asked = (*args, kwargs.get("dtype"))
        return self if any(keep(a, self) for a in asked) else to(self, *args, **kwargs)

    def wide_softmax(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if keep(kwargs.get("dtype"), input):
            kwargs["dtype"] = torch.float64
        return softmax(input, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", wide_to)
    monkeypatch.setattr(Tensor, "float", lambda self: wide_to(self, torch.float32))
    monkeypatch.setattr(F, "softmax", wide_softmax)
