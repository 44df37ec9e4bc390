"""The ways of training that the benchmarks compare, each one logical batch at a time.

All train the same model on the same tokens with the same per-record loss and optimizer, so that
their times differ by the cost of privacy alone.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Protocol

from models import Shape
from torch import Tensor, nn

from veilspan.core import Flat, PerLayer, PrivateStep, Sketch, new_key
from veilspan.core.opacus import use_veilspan_norms

CLIP_NORM = 1.0


class Method(Protocol):
    """One way of training; holds its model, its optimizer and nothing of the batch."""

    model: nn.Module

    def gradient(self, tokens: Tensor) -> Iterator[int]:
        """Yield the records of each micro-batch once it is done.

        At the end the gradient of the logical batch is in `.grad`.
        """
        ...

    def update(self) -> None:
        """Apply and clear the gradient."""
        ...


class Plain:
    """Training without privacy, gradients accumulated over micro-batches."""

    def __init__(self, shape: Shape, size: int, noise_multiplier: float) -> None:
        self.model = shape.model()
        self._optimizer = shape.optimizer_of(self.model)
        self._shape, self._size = shape, size

    def gradient(self, tokens: Tensor) -> Iterator[int]:
        for part in tokens.split(self._size):
            (self._shape.losses(self.model, part).sum() / len(tokens)).backward()
            yield len(part)

    def update(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()


class Veilspan:
    """Our private step with one strategy and one norm method; `per_layer` clips each layer.

    On a GPU the noise is drawn there: drawn on the CPU, it takes longer than the rest of a step.
    """

    def __init__(
        self,
        shape: Shape,
        size: int,
        noise_multiplier: float,
        *,
        backward: str,
        norms: str | Sketch = "auto",
        triton: bool = False,
    ) -> None:
        on_gpu: dict[str, Any] = {}
        if shape.device != "cpu":
            kernels = importlib.import_module("veilspan.kernels")
            on_gpu["noise"] = kernels.TritonNoise(new_key())
            on_gpu["kernel"] = kernels.TritonKernel() if triton else None
        self.model = shape.model()
        self._optimizer = shape.optimizer_of(self.model)
        self._shape, self._size = shape, size
        clipping = (PerLayer if backward == "per_layer" else Flat)(clip_norm=CLIP_NORM)
        self._step = PrivateStep(
            self.model,
            clipping=clipping,
            noise_multiplier=noise_multiplier,
            expected_batch_size=shape.records,
            backward=backward,
            norms=norms,
            **on_gpu,
        )

    def choice(self, size: int, length: int) -> str:
        """Return the strategy for a micro-batch of `size` records of `length` tokens."""
        return self._step._plan.choice(size, length).name

    def best_microbatch(self, length: int, most: int) -> int:
        """Return the size of micro-batch that the cost model finds fastest."""
        return self._step.best_microbatch(length, most)

    def gradient(self, tokens: Tensor) -> Iterator[int]:
        with self._step:
            for part in tokens.split(self._size):
                self._step.backward(self._shape.losses(self.model, part))
                yield len(part)

    def update(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()


class OpacusHooks:
    """Opacus with per-sample gradients, accumulating as its BatchMemoryManager does.

    Never with activation checkpointing, whose second forward its hooks take for another use.
    """

    def __init__(self, shape: Shape, size: int, noise_multiplier: float) -> None:
        # A rival, installed for benchmarks alone: imported by name, so that types need no Opacus.
        grad_sample = importlib.import_module("opacus.grad_sample")
        optimizers = importlib.import_module("opacus.optimizers")
        warnings.filterwarnings("ignore", "Full backward hook is firing")  # its own hooks
        self.model = replace(shape, checkpointing=False).model()
        self._shape, self._size = shape, size
        self._wrapped: Any = grad_sample.GradSampleModule(
            self.model, strict=False, loss_reduction="sum"
        )
        self._optimizer: Any = optimizers.DPOptimizer(
            shape.optimizer_of(self.model),
            noise_multiplier=noise_multiplier,
            max_grad_norm=CLIP_NORM,
            expected_batch_size=shape.records,
            loss_reduction="sum",
        )

    def gradient(self, tokens: Tensor) -> Iterator[int]:
        parts = tokens.split(self._size)
        for number, part in enumerate(parts):
            self._backward(part)
            self._optimizer.signal_skip_step(number < len(parts) - 1)
            if number < len(parts) - 1:
                self._optimizer.step()  # adds to the sum; skips the update
                self._optimizer.zero_grad()
            yield len(part)
        self._optimizer.pre_step()  # clipped sum, noise: leaves `.grad`
        for parameter in self.model.parameters():
            assert parameter.grad is not None
            parameter.grad /= len(tokens)

    def update(self) -> None:
        self._optimizer.original_optimizer.step()
        self._optimizer.zero_grad()

    def _backward(self, part: Tensor) -> None:
        self._shape.losses(self._wrapped, part, fused=False).sum().backward()


class OpacusGhost(OpacusHooks):
    """Opacus with two backward passes: ghost or fast gradient clipping; `bridged`: our norms."""

    def __init__(
        self,
        shape: Shape,
        size: int,
        noise_multiplier: float,
        *,
        ghost: bool = True,
        bridged: bool = False,
    ) -> None:
        grad_sample = importlib.import_module("opacus.grad_sample")
        optimizers = importlib.import_module("opacus.optimizers")
        self._tensor = importlib.import_module(
            "opacus.utils.fast_gradient_clipping_utils"
        ).DPTensorFastGradientClipping
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        self.model = replace(shape, checkpointing=False).model()
        self._shape, self._size = shape, size
        self._wrapped = grad_sample.GradSampleModuleFastGradientClipping(
            self.model,
            strict=False,
            max_grad_norm=CLIP_NORM,
            use_ghost_clipping=ghost,
            loss_reduction="sum",
        )
        if bridged:
            use_veilspan_norms(self._wrapped)
        self._optimizer = optimizers.DPOptimizerFastGradientClipping(
            shape.optimizer_of(self.model),
            noise_multiplier=noise_multiplier,
            max_grad_norm=CLIP_NORM,
            expected_batch_size=shape.records,
            loss_reduction="sum",
        )

    def _backward(self, part: Tensor) -> None:
        losses_B = self._shape.losses(self._wrapped, part, fused=False)
        self._tensor(self._wrapped, self._optimizer, losses_B, loss_reduction="sum").backward()


class FastDP:
    """fastDP with book-keeping and mixed ghost norms (`MixOpt`).

    It has no rule for the norms of Llama and leaves them untrained. Its rewriting of GPT-2's
    forward, made for another transformers, is off: positions carry a record dimension already.
    """

    def __init__(self, shape: Shape, size: int, noise_multiplier: float) -> None:
        engine = importlib.import_module("fastDP.privacy_engine")
        engine.transformers_support.forward_swapper = lambda module: None
        warnings.filterwarnings("ignore", "Using a non-full backward hook")
        self.model = shape.model()
        self._optimizer = shape.optimizer_of(self.model)
        self._shape, self._size = shape, size
        with contextlib.redirect_stdout(io.StringIO()):
            self._engine: Any = engine.PrivacyEngine(
                self.model,
                batch_size=shape.records,
                sample_size=1_000_000,
                epochs=1,
                max_grad_norm=CLIP_NORM,
                noise_multiplier=noise_multiplier,
                clipping_fn="Abadi",
                clipping_mode="MixOpt",
                loss_reduction="sum",
            )

    def gradient(self, tokens: Tensor) -> Iterator[int]:
        for part in tokens.split(self._size):
            self._shape.losses(self.model, part, fused=False).sum().backward()
            yield len(part)
        self._optimizer.zero_grad()
        with contextlib.redirect_stdout(io.StringIO()):
            self._engine._create_noisy_clipped_gradient()
        for _, parameter in self._engine.named_params:
            parameter.grad /= len(tokens)

    def update(self) -> None:
        self._engine.unlock()
        self._optimizer.step()
        self._optimizer.zero_grad()


METHODS: dict[str, Callable[[Shape, int, float], Method]] = {
    "plain": Plain,
    **{
        name: lambda shape, size, noise, name=name: Veilspan(shape, size, noise, backward=name)
        for name in ("auto", "single_sample", "per_sample", "bookkeeping", "two_pass", "per_layer")
    },
    **{
        f"{name}_sketch": lambda shape, size, noise, name=name: Veilspan(
            shape, size, noise, backward=name, norms=Sketch()
        )
        for name in ("bookkeeping", "two_pass")
    },
    **{
        f"{name}_triton": lambda shape, size, noise, name=name: Veilspan(
            shape, size, noise, backward=name, triton=True
        )
        for name in ("bookkeeping", "per_layer")
    },
    "opacus_hooks": OpacusHooks,
    "opacus_ghost": OpacusGhost,
    "opacus_fgc": lambda shape, size, noise: OpacusGhost(shape, size, noise, ghost=False),
    "fastdp_mixopt": FastDP,
    "opacus_bridged": lambda shape, size, noise: OpacusGhost(shape, size, noise, bridged=True),
}
"""Builds a method for a shape, records of a micro-batch, and a noise multiplier."""


def why_absent(name: str) -> str | None:
    """Return why a method cannot run here, or None."""
    package = {"opacus": "opacus", "fastdp": "fastDP"}.get(name.split("_", maxsplit=1)[0])
    if package is None or importlib.util.find_spec(package) is not None:
        return None
    return f"{package} is not installed"
