"""The ways of training that the step benchmark compares, each one logical batch at a time.

All train the same model on the same tokens with the same per-record loss and AdamW, so that their
times differ by the cost of privacy alone. A method is named after its strategy and the number of
records in its micro-batches.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from veilspan.core import Flat, PrivateStep
from veilspan.core.losses import causal_lm_losses
from veilspan.core.opacus import use_veilspan_norms

CLIP_NORM = 1
QUICK = {"hidden": 64, "intermediate": 172, "layers": 2, "vocabulary": 256}
"""A model so small that it only shows whether everything runs."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The model, plus the records of one logical batch."""

    length: int
    records: int = 4  # of one logical batch
    hidden: int = 512
    intermediate: int = 1376
    layers: int = 4
    heads: int = 8
    vocabulary: int = 8192

    def model(self) -> nn.Module:
        """Return a Llama with random weights, fp32, untied head."""
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=self.length,
            tie_word_embeddings=False,
            use_cache=False,
        )
        return LlamaForCausalLM(config).train()

    def tokens(self, round_number: int) -> Tensor:
        """Return random token ids, `[records, length]`."""
        generator = torch.Generator().manual_seed(round_number)
        return torch.randint(self.vocabulary, (self.records, self.length), generator=generator)


def without_opacus(names: Sequence[str]) -> list[str]:
    """Return the methods that can run here."""
    if importlib.util.find_spec("opacus") is not None:
        return list(names)
    print("Opacus is not installed; it is left out. pip install opacus==1.6.0")
    return [name for name in names if not name.startswith("opacus")]


class Method(Protocol):
    """One way of training; holds its model, its optimizer and nothing of the batch."""

    model: nn.Module

    def gradient(self, tokens: Tensor) -> None:
        """Leave the gradient of one logical batch in `.grad`."""
        ...

    def update(self) -> None:
        """Apply and clear the gradient."""
        ...


def _losses(model: nn.Module, tokens: Tensor) -> Tensor:
    return causal_lm_losses(model(tokens).logits, tokens)


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4)


class Plain:
    """Training without privacy, gradients accumulated over micro-batches."""

    def __init__(self, shape: Shape, noise_multiplier: float, *, size: int) -> None:
        self.model = shape.model()
        self._optimizer = _adamw(self.model)
        self._size = size

    def gradient(self, tokens: Tensor) -> None:
        for part in tokens.split(self._size):
            (_losses(self.model, part).sum() / len(tokens)).backward()

    def update(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()


class Veilspan:
    """Our private step with one strategy and one norm method."""

    def __init__(
        self,
        shape: Shape,
        noise_multiplier: float,
        *,
        size: int,
        backward: str,
        norms: str = "auto",
    ) -> None:
        self.model = shape.model()
        self._optimizer = _adamw(self.model)
        self._size = size
        self._step = PrivateStep(
            self.model,
            clipping=Flat(clip_norm=CLIP_NORM),
            noise_multiplier=noise_multiplier,
            expected_batch_size=shape.records,
            backward=backward,
            norms=norms,
        )

    def gradient(self, tokens: Tensor) -> None:
        with self._step:
            for part in tokens.split(self._size):
                self._step.backward(_losses(self.model, part))

    def update(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()


class OpacusGhost:
    """Opacus ghost clipping, accumulating over micro-batches as its BatchMemoryManager does.

    `bridged` with our norms in its engine.
    """

    def __init__(
        self, shape: Shape, noise_multiplier: float, *, size: int, bridged: bool = False
    ) -> None:
        # A rival, installed for benchmarks alone: imported by name, so that types need no Opacus.
        grad_sample = importlib.import_module("opacus.grad_sample")
        optimizers = importlib.import_module("opacus.optimizers")
        self._tensor = importlib.import_module(
            "opacus.utils.fast_gradient_clipping_utils"
        ).DPTensorFastGradientClipping
        warnings.filterwarnings("ignore", "Full backward hook is firing")  # its own hooks
        self.model = shape.model()
        self._size = size
        self._wrapped = grad_sample.GradSampleModuleFastGradientClipping(
            self.model, strict=False, max_grad_norm=CLIP_NORM
        )
        if bridged:
            use_veilspan_norms(self._wrapped)
        self._optimizer = optimizers.DPOptimizerFastGradientClipping(
            _adamw(self.model),
            noise_multiplier=noise_multiplier,
            max_grad_norm=CLIP_NORM,
            expected_batch_size=shape.records,
        )

    def gradient(self, tokens: Tensor) -> None:
        parts = tokens.split(self._size)
        for number, part in enumerate(parts):
            losses_B = _losses(self._wrapped, part)
            self._tensor(self._wrapped, self._optimizer, losses_B).backward()
            self._optimizer.signal_skip_step(number < len(parts) - 1)
            if number < len(parts) - 1:
                self._optimizer.step()  # adds to the sum; skips the update
                self._optimizer.zero_grad()
        self._optimizer.pre_step()  # clipped sum, noise, scale: leaves `.grad`

    def update(self) -> None:
        self._optimizer.original_optimizer.step()
        self._optimizer.zero_grad()


METHODS: dict[str, Callable[[Shape, float], Method]] = {
    "plain_1": lambda shape, noise: Plain(shape, noise, size=1),
    "plain_2": lambda shape, noise: Plain(shape, noise, size=2),
    "single_sample": lambda shape, noise: Veilspan(shape, noise, size=1, backward="single_sample"),
    "per_sample_2": lambda shape, noise: Veilspan(shape, noise, size=2, backward="per_sample"),
    "two_pass_direct_2": lambda shape, noise: Veilspan(
        shape, noise, size=2, backward="two_pass", norms="direct"
    ),
    "two_pass_gram_2": lambda shape, noise: Veilspan(
        shape, noise, size=2, backward="two_pass", norms="gram"
    ),
    "opacus_ghost_1": lambda shape, noise: OpacusGhost(shape, noise, size=1),
    "opacus_ghost_2": lambda shape, noise: OpacusGhost(shape, noise, size=2),
    "opacus_bridged_2": lambda shape, noise: OpacusGhost(shape, noise, size=2, bridged=True),
}
BASELINES = {
    name: "plain_1" if name in ("single_sample", "opacus_ghost_1") else "plain_2"
    for name in METHODS
    if not name.startswith("plain")
}
