"""Normals from forced words: the tails, every quadrant, and the precision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from veilspan.kernels.compat import jit, tl
from veilspan.kernels.normals import normals, normals_kernel


@jit
def _forced_kernel(radius, more, angle, first, second, REFINED: tl.constexpr):
    lane = tl.arange(0, 64)
    first_64, second_64 = normals_kernel(
        tl.load(radius + lane).to(tl.uint32),
        tl.load(more + lane).to(tl.uint32),
        tl.load(angle + lane).to(tl.uint32),
        REFINED,
    )
    tl.store(first + lane, first_64)
    tl.store(second + lane, second_64)


def extreme_words() -> NDArray[np.uint32]:
    """Return radius, more and angle words at every edge, then some at random, `[3, 64]`."""
    edges = [0, 1, 255, 256, 2**31, 3037000498, 3037000500, 2**32 - 2, 2**32 - 1]
    quadrants = [q * 2**29 + d for q in range(8) for d in (-1, 0, 1)]
    rows = np.random.default_rng(0).integers(0, 2**32, (3, 64), np.uint64)
    rows[0, : len(edges)], rows[1, :3] = edges, (0, 1, 2**32 - 1)
    rows[2, : len(quadrants)] = [q % 2**32 for q in quadrants]
    return rows.astype(np.uint32)


def test_forced_words_reach_beyond_nine_sigma_exactly(device: torch.device) -> None:
    pytest.importorskip("triton")
    rows = extreme_words()
    rows[:, 30], rows[:, 31] = (0, 0, 0), (0, 0, 2**30)
    arguments = [torch.tensor(row.astype(np.int64), device=device) for row in rows]
    first, second = torch.empty((2, 64), device=device)
    # As launchers do: a product fused with a sum would be rounded once, NumPy's twice.
    _forced_kernel[(1,)](*arguments, first, second, REFINED=True, enable_fp_fusion=False)
    found = [first.cpu().numpy(), second.cpu().numpy()]
    for mine, theirs in zip(found, normals(*rows), strict=True):
        assert np.array_equal(mine, theirs)
    assert found[0][30] > 9.48
    assert found[1][31] > 9.48


def test_normals_have_the_documented_precision() -> None:
    rng = np.random.default_rng(1)
    many = rng.integers(0, 2**32, (3, 400_000), np.uint64)
    many[0, ::4] >>= rng.integers(0, 32, 100_000, np.uint64)  # small radius words
    many[0, 1::4] = 2**32 - 1 - many[0, 1::4] // 2**12  # and large ones
    radius, more, angle = np.concatenate([many, extreme_words()], 1).astype(np.uint32)
    short, long = radius + np.longdouble(0.5), radius * np.longdouble(2**32) + more + 0.5
    uniform = np.where(radius < 256, long / 2**64, short / 2**32)
    length = np.sqrt(-2 * np.log(uniform))
    theta = 2 * np.longdouble(math.pi) * (angle.astype(np.longdouble) + 0.5) / 2**32
    exact = length * np.cos(theta), length * np.sin(theta)
    for mine, theirs in zip(normals(radius, more, angle), exact, strict=True):
        assert np.max(np.abs(mine / theirs - 1)) < 5e-7
