"""Squared norms estimated from random projections."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from veilspan.kernels import Probes, sketch_norm
from veilspan.kernels.ops import sketch_norm as module
from veilspan.kernels.testing import Fence, random

KEY = bytes(range(32))


@pytest.fixture
def _in_pytorch(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Leave out the interpreter where hundreds of draws are needed: the bits are the same."""
    if device.type == "cpu":
        for place in ("ops.add_noise", "tiles"):
            monkeypatch.setattr(f"veilspan.kernels.{place}.runs_kernels", lambda tensor: False)


def probes(**changes: Any) -> Probes:
    return Probes(**{"key": KEY, "step": 3, "name": "layer", "per_sample": False, **changes})


def exact(act_BTI: Tensor, grad_BTO: Tensor, matrix_BOk: Tensor, blocks: int) -> Tensor:
    """Return the estimate in fp64 from the probes as they are."""
    sketch = act_BTI.double().mT @ (grad_BTO.double() @ matrix_BOk.double())
    parts = sketch.square().sum(1).unflatten(1, (blocks, -1))
    return parts.mean(2).amax(1)


def matrices(chosen: Probes, samples: int, outputs: int, device: torch.device) -> Tensor:
    return torch.stack([chosen.rows(0, outputs, outputs, device, sample=b) for b in range(samples)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 17, 23, 9), (2, 40, 5, 130)])
def test_estimates_equal_fp64(
    sizes: tuple[int, int, int, int], per_sample: bool, dtype: torch.dtype, fence: Fence
) -> None:
    samples, tokens, inputs, outputs = sizes
    act_BTI = fence(random(samples, tokens, inputs, dtype=dtype, seed=1))
    grad_BTO = fence(random(samples, tokens, outputs, dtype=dtype, seed=2))
    chosen = probes(number=16, blocks=2, per_sample=per_sample)
    found = sketch_norm(act_BTI, grad_BTO, chosen)
    right = exact(act_BTI, grad_BTO, matrices(chosen, samples, outputs, act_BTI.device), 2)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("per_sample", [False, True])
def test_probes_drawn_again_are_those_that_were_stored(
    per_sample: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 8 * 8 * 3)  # three rows at a time
    act_BTI, grad_BTO = random(2, 9, 7), random(2, 9, 20)
    stored = sketch_norm(act_BTI, grad_BTO, probes(number=8, per_sample=per_sample))
    again = sketch_norm(act_BTI, grad_BTO, probes(number=8, per_sample=per_sample, stored=False))
    torch.testing.assert_close(stored, again, rtol=1e-6, atol=0.0)


def test_probes_do_not_depend_on_how_features_are_cut(device: torch.device) -> None:
    chosen = probes(number=16)
    whole = chosen.rows(0, 50, 50, device)
    parts = [chosen.rows(first, 10, 50, device) for first in range(0, 50, 10)]
    assert torch.equal(whole, torch.cat(parts))


def test_a_sample_has_the_same_probes_in_every_cut_of_the_batch() -> None:
    act_BTI, grad_BTO = random(5, 9, 7), random(5, 9, 6)
    whole = sketch_norm(act_BTI, grad_BTO, probes(per_sample=True))
    rest = sketch_norm(act_BTI[3:], grad_BTO[3:], probes(per_sample=True, first_sample=3))
    torch.testing.assert_close(whole[3:], rest, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("change", [{"step": 4}, {"name": "other"}, {"key": KEY[::-1]}])
@pytest.mark.usefixtures("_in_pytorch")
def test_probes_are_fresh_for_every_step_layer_and_key(change: dict, device: torch.device) -> None:
    first = probes(number=64).rows(0, 40, 40, device)
    second = probes(number=64, **change).rows(0, 40, 40, device)
    correlation = float((first * second).mean())
    assert abs(correlation) < 5 / math.sqrt(first.numel())


def test_samples_have_probes_of_their_own_only_where_asked(device: torch.device) -> None:
    for per_sample in (True, False):
        chosen = probes(per_sample=per_sample)
        first, second = (chosen.rows(0, 9, 9, device, sample=b) for b in (0, 1))
        assert torch.equal(first, second) == (not per_sample)


@pytest.mark.usefixtures("_in_pytorch")
def test_the_estimate_is_unbiased_with_the_variance_of_theory() -> None:
    """For a gradient M the variance of k probes is 2·tr((MᵀM)²)/k."""
    act_BTI, grad_BTO = random(1, 6, 5), random(1, 6, 4)
    gram = (grad_BTO.double().mT @ act_BTI.double())[0]
    gram = gram @ gram.mT
    true, variance = float(gram.trace()), 2.0 * float((gram @ gram).trace()) / 16
    runs = 400
    chosen = [probes(number=16, blocks=1, step=step) for step in range(runs)]
    found = torch.stack([sketch_norm(act_BTI, grad_BTO, one)[0] for one in chosen])
    assert abs(float(found.mean()) - true) < 4.5 * math.sqrt(variance / runs)
    assert float(found.var()) == pytest.approx(variance, rel=0.35)


@pytest.mark.usefixtures("_in_pytorch")
def test_a_rank_one_gradient_has_a_chi_square_estimate() -> None:
    """The worst case of an accountant: k·estimate/norm² follows χ² with k degrees of freedom."""
    stats = pytest.importorskip("scipy.stats")
    act_BTI, grad_BTO = random(300, 1, 3), random(300, 1, 4)
    true_B = (act_BTI.double().square().sum((1, 2))) * grad_BTO.double().square().sum((1, 2))
    chosen = probes(number=8, blocks=1, per_sample=True)
    ratio = (8.0 * sketch_norm(act_BTI, grad_BTO, chosen) / true_B).cpu().numpy()
    assert stats.kstest(ratio, "chi2", args=(8,)).pvalue > 1e-3


def test_the_largest_of_the_blocks_is_taken() -> None:
    act_BTI, grad_BTO = random(4, 9, 7), random(4, 9, 6)
    one = sketch_norm(act_BTI, grad_BTO, probes(number=16, blocks=1))
    four = sketch_norm(act_BTI, grad_BTO, probes(number=16, blocks=4))
    assert bool((four >= one * (1 - 1e-6)).all())
    assert bool((four > one).any())


@pytest.mark.parametrize("sizes", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
@pytest.mark.parametrize("per_sample", [False, True])
def test_nothing_has_norm_zero(sizes: tuple[int, int, int, int], per_sample: bool) -> None:
    samples, tokens, inputs, outputs = sizes
    act_BTI, grad_BTO = random(samples, tokens, inputs), random(samples, tokens, outputs)
    found = sketch_norm(act_BTI, grad_BTO, probes(per_sample=per_sample))
    assert found.tolist() == [0.0] * samples


def test_results_are_the_same_in_two_runs() -> None:
    act_BTI, grad_BTO = random(2, 9, 7), random(2, 9, 6)
    first, second = (sketch_norm(act_BTI, grad_BTO, probes()) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"number": 10, "blocks": 4}, "blocks is 4 and number is 10"),
        ({"number": 0}, "number is 0"),
        ({"blocks": 0}, "blocks is 0"),
        ({"step": -1}, "step is -1"),
        ({"first_sample": 1.5}, "first_sample is 1.5"),
        ({"key": bytes(32)}, "key has only 1 distinct byte"),
        ({"stream": "mt19937"}, "stream is 'mt19937'"),
    ],
)
def test_bad_probes_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        probes(**change)


def test_bad_operands_are_named() -> None:
    with pytest.raises(ValueError, match="grad_BTO has shape"):
        sketch_norm(torch.ones(2, 3, 4), torch.ones(2, 4, 4), probes())


def test_the_key_is_not_shown() -> None:
    assert "key" not in repr(probes())
