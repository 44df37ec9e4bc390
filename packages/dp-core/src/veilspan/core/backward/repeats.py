"""Whether the second of two backward passes repeats the first, as one measures what the other adds.

A forward pass that activation checkpointing runs again may compute something else. B samples.
"""

from __future__ import annotations

import math
import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from veilspan.core.errors import PrivacyError
from veilspan.core.micro_batch import Pass, Use


@dataclass
class SeenPass:
    """Looks at a few numbers of what another pass receives.

    Args:
        wanted: The other pass.
        seen: What each use of a module showed, by module path and kind.
        grain: Spacing of the coarsest numbers among them.
    """

    wanted: Pass
    seen: dict[tuple[str, str], list[Tensor]] = field(default_factory=dict)
    grain: float = 0.0

    @property
    def keeps(self) -> bool:
        """What the other pass does."""
        return self.wanted.keeps

    def receive(self, use: Use) -> None:
        """Look at one use, and pass it on."""
        self.grain = max(self.grain, torch.finfo(use.dtype).eps)
        for kind, numbers_Bn in use.glimpse().items():
            self.seen.setdefault((use.site.name, kind), []).append(numbers_Bn)
        self.wanted.receive(use)

    def require_repeated(self, again: SeenPass) -> None:
        """Refuse a second pass that showed something else.

        Raises:
            PrivacyError: Naming a module.
        """
        pairs, order = list[tuple[str, str, Tensor, Tensor]](), [*self.seen, *again.seen]
        for name, kind in dict.fromkeys(order):
            before, now = self.seen.get((name, kind), []), again.seen.get((name, kind), [])
            if [x.shape for x in before] != [x.shape for x in now]:
                _refuse(name)
            pairs += [(name, kind, x, y) for x, y in zip(before, now, strict=True)]
        if not pairs:
            return
        least = self._least_by_kind()
        apart = torch.stack([self._apart(x, y, least[kind]) for _, kind, x, y in pairs])
        if bool(apart.any()):
            _refuse(pairs[int(apart.nonzero()[0])][0])

    def _apart(self, before_Bn: Tensor, now_Bn: Tensor, least_B: Tensor) -> Tensor:
        """Return whether any sample differs by more than rounding in another order explains."""
        if not before_Bn.is_floating_point():
            return (before_Bn != now_Bn).any()
        gap_B, size_B = _norms(now_Bn - before_Bn), _norms(before_Bn)
        allowed_B = math.sqrt(self.grain) * size_B + least_B
        unlike = before_Bn.isfinite() != now_Bn.isfinite()
        return (gap_B > allowed_B).any() | unlike.any()

    def _least_by_kind(self) -> dict[str, Tensor]:
        """Return what counts as zero beside the largest numbers of a sample, `[B]`, by kind."""
        found: dict[str, Tensor] = {}
        for (_, kind), uses in self.seen.items():
            for numbers_Bn in uses:
                least_B = self.grain * _norms(numbers_Bn).nan_to_num(0.0, 0.0, 0.0)
                known_B = found.get(kind)
                found[kind] = least_B if known_B is None else torch.maximum(known_B, least_B)
        return found


def _norms(numbers_Bn: Tensor) -> Tensor:
    return torch.linalg.vector_norm(numbers_Bn.double(), dim=1)


def _refuse(name: str) -> NoReturn:
    raise PrivacyError(
        "The second backward pass of backward='two_pass' did not repeat the first (seen at module "
        f"'{name}'), so the sum would hold other gradients than were measured. Activation "
        "checkpointing gives back the random numbers of torch's own generators, but not those of "
        "a torch.Generator of the model's, nor what the model counts: draw from torch's own, or "
        "use another strategy."
    )


@contextmanager
def nothing_drawn(device: torch.device) -> Iterator[None]:
    """Refuse a backward pass that draws random numbers: the next one would draw others.

    Raises:
        PrivacyError: If the state of a generator that all share has changed: of torch, Python or
            NumPy.
    """
    before = _generator_states(device)
    yield
    if _generator_states(device) != before:
        raise PrivacyError(
            "The backward pass drew random numbers, so the second pass of backward='two_pass' "
            "would add other gradients than the first one measured. Let activation checkpointing "
            "draw the same masks again (preserve_rng_state=True), or use another strategy."
        )


def _generator_states(device: torch.device) -> list[object]:
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    of_numpy = pickle.dumps(np.random.get_state(legacy=False))  # to compare it
    return [*(state.numpy().tobytes() for state in states), random.getstate(), of_numpy]
