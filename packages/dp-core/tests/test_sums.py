"""Exact sums: bitwise the same in any order and division, and never longer than the bound."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from veilspan.core import Clip, Flat, PerLayer, PrivateStep
from veilspan.core.testing.conformance import assert_step_matches_oracle

STRATEGIES = ["single_sample", "per_sample", "bookkeeping", "two_pass", "per_layer"]


class Tied(nn.Module):
    """Embedding with a tied head, norm and linear map with bias."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.mix = nn.Embedding(11, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        hidden = self.embed(ids)
        return self.head(hidden + torch.tanh(self.mix(self.norm(hidden))))


def losses_of(model, batch):
    entropy = nn.functional.cross_entropy(model(batch["ids"]).mT, batch["ids"], reduction="none")
    return entropy.sum(1)


def clipping_for(backward, clip_norm=0.3):
    return (PerLayer if backward == "per_layer" else Flat)(clip_norm=clip_norm, rule=Clip())


def exact_sum(model, ids, sizes, backward, accumulate="exact"):
    step = PrivateStep(
        model,
        clipping=clipping_for(backward),
        noise_multiplier=0,
        expected_batch_size=1.0,
        backward=backward,
        accumulate=accumulate,
    )
    with step:
        for part in ids.split(sizes):
            step.backward(losses_of(model, {"ids": part}))
    step.detach()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return got


@pytest.mark.parametrize("backward", STRATEGIES)
def test_exact_sums_equal_the_oracle(backward):
    torch.manual_seed(0)
    assert_step_matches_oracle(
        Tied().double(),
        losses_of,
        {"ids": torch.randint(0, 11, (4, 6))},
        clipping=clipping_for(backward),
        size=1 if backward == "single_sample" else 4,
        backward=backward,
        accumulate="exact",
        tolerance=1e-9,  # truncation to C·2⁻⁴⁰
    )


@pytest.mark.parametrize("backward", ["single_sample", "per_sample", "per_layer"])
def test_exact_sums_are_bitwise_the_same_in_every_order(backward):
    """Only order of addition: the same micro-batch shape, so that products round alike."""
    torch.manual_seed(0)
    model, ids = Tied(), torch.randint(0, 11, (12, 6))
    forward = exact_sum(model, ids, 1, backward)
    reverse = exact_sum(model, ids.flip(0), 1, backward)
    for one, other in zip(forward, reverse, strict=True):
        assert torch.equal(one, other)


@settings(deadline=None, max_examples=25)
@given(
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e20]),
    clip_norm=st.sampled_from([1e-8, 0.3, 1e8]),
    size=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_removing_a_record_changes_an_exact_sum_by_at_most_the_clip_norm(
    scale, clip_norm, size, seed
):
    """The bound holds with no allowance at all, for sums taken before they leave fp64."""
    torch.manual_seed(seed)
    x = scale * torch.randn(size, 40)
    sums = []
    for rows in (x, x[1:]):
        model = nn.Linear(40, 1, bias=False)
        kept = []
        step = PrivateStep(
            model,
            clipping=Flat(clip_norm=clip_norm),
            noise_multiplier=0,
            expected_batch_size=1.0,
            accumulate="exact",
            backward="per_sample",
            reduction=_Keep(kept),
        )
        with step:
            step.backward(model(rows).sum(1)) if len(rows) else None
        sums.append(kept[0])
    change = (sums[0] - sums[1]).double().norm().item()
    assert change <= 2.0**40


class _Keep:
    def __init__(self, kept):
        self._kept = kept

    def sum_(self, tensors):
        assert all(tensor.dtype == torch.int64 for tensor in tensors)
        self._kept.extend(tensor.clone() for tensor in tensors)


def test_fp32_sums_depend_on_the_order_where_exact_ones_do_not():
    """Shows that the test of orders can fail."""
    torch.manual_seed(0)
    model, ids = Tied(), torch.randint(0, 11, (64, 6))
    forward = exact_sum(model, ids, 1, "per_sample", "fp32")
    reverse = exact_sum(model, ids.flip(0), 1, "per_sample", "fp32")
    assert any(not torch.equal(a, b) for a, b in zip(forward, reverse, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": "int8"}, "accumulate is 'int8'"),
        ({"clipping": Flat(clip_norm=float("inf"))}, "finite clip_norm"),
        ({"expected_batch_size": 2.0**23}, "expected records"),
    ],
)
def test_exact_sums_that_cannot_be_are_refused(options, message):
    settings = {"clipping": Flat(clip_norm=1.0), "expected_batch_size": 1.0, "accumulate": "exact"}
    with pytest.raises(ValueError, match=message):
        PrivateStep(nn.Linear(2, 2), noise_multiplier=0, **(settings | options))
