"""The models that benchmarks train, from random weights: Llama-like and GPT-2-like stacks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veilspan.core.head import fused_causal_lm_losses
from veilspan.core.losses import causal_lm_losses


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model, the records of one logical batch, and where they live.

    Args:
        family: `llama` or `gpt2`.
        length: Tokens T of a record.
        records: Records of a logical batch.
        kv_heads: Heads of keys and values; 0 for as many as `heads`.
        fused_head: Score the head in chunks, so that no logits are stored, where a method can.
        checkpointing: Compute each layer's activations again in the backward pass.
        optimizer: `adamw`, or `sgd` where the state of AdamW would not fit beside the model.
    """

    length: int
    records: int = 4
    family: str = "llama"
    hidden: int = 512
    intermediate: int = 1376
    layers: int = 4
    heads: int = 8
    kv_heads: int = 0
    vocabulary: int = 8192
    dtype: str = "float32"
    device: str = "cpu"
    fused_head: bool = False
    checkpointing: bool = False
    optimizer: str = "adamw"

    def model(self) -> nn.Module:
        """Return the model with random weights and an untied head."""
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, self.dtype))
        try:
            with torch.device(self.device):
                model = self._llama() if self.family == "llama" else self._gpt2()
        finally:
            torch.set_default_dtype(before)
        if self.checkpointing:
            old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"
            getattr(model, new if hasattr(model, new) else old)({"use_reentrant": False})
        return model.train()

    def optimizer_of(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer of a model."""
        kind = torch.optim.AdamW if self.optimizer == "adamw" else torch.optim.SGD
        return kind(model.parameters(), lr=1e-4)

    def tokens(self, round_number: int) -> Tensor:
        """Return random token ids, `[records, length]`."""
        generator = torch.Generator().manual_seed(round_number)
        shape = (self.records, self.length)
        return torch.randint(self.vocabulary, shape, generator=generator).to(self.device)

    def losses(self, model: nn.Module, tokens: Tensor, *, fused: bool = True) -> Tensor:
        """Return the loss of each record.

        Args:
            model: The model, possibly wrapped.
            tokens: Token ids, `[B, T]`.
            fused: Whether the method can do with a head whose logits are never stored.
        """
        inputs = {}
        if self.family == "gpt2":  # a position table whose input has a record dimension
            at = torch.arange(tokens.shape[1], device=tokens.device)
            inputs["position_ids"] = at.expand(tokens.shape).contiguous()
        if fused and self.fused_head:
            return fused_causal_lm_losses(model, tokens, **inputs)
        return causal_lm_losses(model(tokens, **inputs).logits, tokens)

    def flops(self) -> float:
        """Return the operations of one logical batch without privacy: forward and backward."""
        grouped = (self.kv_heads or self.heads) / self.heads
        attention = (2 + 2 * grouped) * self.hidden**2
        matrices = 3 if self.family == "llama" else 2
        linear = self.layers * (attention + matrices * self.hidden * self.intermediate)
        linear += self.hidden * self.vocabulary
        scores = self.layers * 2 * self.length * self.hidden  # causal: half of the square
        return self.records * self.length * (6 * linear + 3 * scores)

    def _llama(self) -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads or self.heads,
            max_position_embeddings=self.length,
            tie_word_embeddings=False,
            use_cache=False,
        )
        return LlamaForCausalLM(config)

    def _gpt2(self) -> nn.Module:
        """GPT-2 without dropout; its transposed linear maps as `nn.Linear`, which all peers know.

        With the maps as they come, Opacus has no rule for them and falls back to something slower.
        """
        from transformers import GPT2Config, GPT2LMHeadModel
        from transformers.pytorch_utils import Conv1D

        config = GPT2Config(
            vocab_size=self.vocabulary,
            n_embd=self.hidden,
            n_inner=self.intermediate,
            n_layer=self.layers,
            n_head=self.heads,
            n_positions=self.length,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            tie_word_embeddings=False,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
        )
        model = GPT2LMHeadModel(config)
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, Conv1D):
                    inputs, outputs = child.weight.shape
                    linear = nn.Linear(inputs, outputs)
                    linear.weight.data.copy_(child.weight.data.mT)
                    linear.bias.data.copy_(child.bias.data)
                    setattr(parent, name, linear)
        return model


QUICK: dict[str, Any] = {
    "hidden": 64,
    "intermediate": 172,
    "layers": 2,
    "heads": 4,
    "vocabulary": 256,
}
"""A model so small that it only shows whether everything runs."""
