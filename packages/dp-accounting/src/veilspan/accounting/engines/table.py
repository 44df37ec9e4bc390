"""δ(ε) of a tilted distribution on a grid, by sums over blocks of it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.linalg import solve_banded

from veilspan.accounting.engines.one_step import Array
from veilspan.accounting.engines.protocol import EngineError

LARGEST_EXPONENT = 600.0
_BLOCK = 512  # grid points whose sums are kept together


class Table:
    """Sums over blocks of a tilted distribution, so that δ(ε) takes one block and no more.

    Args:
        tilted: Mass at each grid point.
        first_loss: Loss of the first of them.
        spacing: Distance of neighbouring losses.
        scale: θ and κ: the mass at a loss stands for exp(κ - θ · loss) times as much.

    Raises:
        EngineError: If a mass is not a number.
    """

    def __init__(
        self, tilted: Array, first_loss: float, spacing: float, scale: tuple[float, float]
    ) -> None:
        self._tilted, self._first_loss, self._spacing = tilted, first_loss, spacing
        self._theta, self._log_scale = scale
        rows = -(-len(tilted) // _BLOCK)
        blocks = np.zeros(rows * _BLOCK)
        blocks[: len(tilted)] = tilted
        inside = spacing * np.arange(_BLOCK)
        back = np.exp(-self._theta * inside)
        sums = blocks.reshape(rows, _BLOCK) @ np.stack([back, back * -np.expm1(-inside)], axis=1)
        if not np.isfinite(sums).all():
            raise EngineError("the Fourier transform of the loss overflowed")
        self._start = first_loss + spacing * _BLOCK * np.arange(rows)
        # Where this is cut off δ(ε) is not asked: its error has no bound there.
        exponent = np.minimum(self._log_scale - self._theta * self._start, LARGEST_EXPONENT)
        mass, gain = (sums * np.exp(exponent)[:, None]).T
        self._above = np.cumsum(mass[::-1])[::-1]
        # Σ w (1 - e^(start - loss)) over the block and all above, by backward substitution.
        width = spacing * _BLOCK
        gain[:-1] += -math.expm1(-width) * self._above[1:]
        bands = np.vstack([np.full(rows, -math.exp(-width)), np.ones(rows)])
        self._gain: Any = solve_banded((0, 1), bands, gain, check_finite=False)

    def delta(self, epsilon: float) -> float:
        """Return Σ w (1 - e^(ε - loss)) over the losses above ε."""
        node = max(0, math.ceil((epsilon - self._first_loss) / self._spacing))
        if node >= len(self._tilted):
            return 0.0
        block = node // _BLOCK
        tilted = self._tilted[node : (block + 1) * _BLOCK]
        loss = self._first_loss + self._spacing * np.arange(node, node + len(tilted))
        weight = tilted * np.exp(self._log_scale - self._theta * loss)
        total = float(np.dot(weight, -np.expm1(np.minimum(epsilon - loss, 0.0))))
        if block + 1 < len(self._start):
            down = math.exp(min(epsilon - self._start[block + 1], 0.0))
            above = float(self._above[block + 1])
            total += (1 - down) * above + down * float(self._gain[block + 1])
        return total
