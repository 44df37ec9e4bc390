"""Every pair of choices equals the float64 oracle: a pairwise covering array over all of them.

Groups, rule, norm method, strategy, dtype, checkpointing, sums, tying and micro-batch size are
independent choices. All of them together would be thousands of cases; this array holds every *pair*
of values of two different choices at least once (the construction is greedy, and one test checks
that no pair is missing).
"""

from __future__ import annotations

import itertools
import random
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from veilspan.core import (
    Automatic,
    ByPattern,
    Clip,
    Flat,
    PerBlock,
    PerLayer,
    PerParameter,
)
from veilspan.core.testing import Oracle
from veilspan.core.testing.conformance import TOLERANCE, assert_close, clipped_sum

CHOICES = {
    "groups": ["flat", "block", "layer", "parameter", "pattern"],
    "budgets": ["equal", "dimension"],
    "rule": [Clip(), Automatic(), Automatic(gamma=0.0)],
    "backward": ["auto", "single_sample", "per_sample", "bookkeeping", "two_pass", "per_layer"],
    "norms": ["auto", "direct", "gram"],
    "dtype": [torch.float64, torch.float32],
    "checkpointing": ["none", "reentrant", "non-reentrant"],
    "accumulate": ["fp32", "exact"],
    "tied": [False, True],
    "size": [1, 2, 5],
}
WITHIN_LAYERS = ("layer", "parameter")


def allowed(case: dict[str, object]) -> bool:
    """Return whether a (partial) case is one that can be built."""
    whole = case.get("groups") in (None, *WITHIN_LAYERS)
    return case.get("backward") != "per_layer" or whole


def pairs_of(case):
    return {
        frozenset([(a, str(case[a])), (b, str(case[b]))])
        for a, b in itertools.combinations(sorted(case), 2)
    }


def wanted_pairs():
    pairs = set()
    for a, b in itertools.combinations(sorted(CHOICES), 2):
        for one, other in itertools.product(CHOICES[a], CHOICES[b]):
            if allowed({a: one, b: other}):
                pairs.add(frozenset([(a, str(one)), (b, str(other))]))
    return pairs


def covering_array() -> list[dict[str, object]]:
    """Return cases that hold every allowed pair: of forty random ones, the best each time."""
    rng, missing, cases = random.Random(0), wanted_pairs(), []
    while missing:
        target = sorted(missing, key=sorted)[0]
        candidates = []
        while len(candidates) < 40:
            case = {name: rng.choice(values) for name, values in CHOICES.items()}
            for name, value in target:
                case[name] = next(v for v in CHOICES[name] if str(v) == value)
            if allowed(case):
                candidates.append(case)
        best = max(candidates, key=lambda case: len(pairs_of(case) & missing))
        missing -= pairs_of(best)
        cases.append(best)
    return cases


CASES = covering_array()


def label(case):
    return "-".join(str(value).replace("torch.", "") for value in case.values())


class Block(nn.Module):
    """Norm, two linear maps with biases."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, hidden):
        return hidden + self.down(torch.tanh(self.up(self.norm(hidden))))


class Decoder(nn.Module):
    """Embedding, two blocks of which the second runs twice, head."""

    def __init__(self, *, tied):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(6, 11, bias=False)
        self.checkpointing = "none"
        if tied:
            self.head.weight = self.embed.weight

    def run(self, block, hidden):
        if self.checkpointing == "none":
            return block(hidden)
        return checkpoint(partial(block), hidden, use_reentrant=self.checkpointing == "reentrant")

    def forward(self, ids):
        hidden = self.embed(ids)
        for block in (self.layers[0], self.layers[1], self.layers[1]):
            hidden = self.run(block, hidden)
        return self.head(hidden)


def clipping_of(case):
    options = {"clip_norm": 0.4, "rule": case["rule"], "budgets": case["budgets"]}
    if case["groups"] == "pattern":
        patterns = {"blocks": "layers.*", "ends": "*"}
        return ByPattern(patterns=patterns, **options)
    kinds = {"flat": Flat, "block": PerBlock, "layer": PerLayer, "parameter": PerParameter}
    return kinds[case["groups"]](**options)


def losses_of(model, batch):
    entropy = nn.functional.cross_entropy(model(batch["ids"]).mT, batch["ids"], reduction="none")
    return entropy.sum(1)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_combination_equals_the_oracle(case):
    torch.manual_seed(0)
    model = Decoder(tied=case["tied"]).to(case["dtype"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    batch, clipping = {"ids": torch.randint(0, 11, (5, 7))}, clipping_of(case)
    expected = Oracle.of(model, losses_of, batch, clipping)
    model.checkpointing = case["checkpointing"]
    got = clipped_sum(
        model,
        losses_of,
        batch,
        clipping=clipping,
        size=1 if case["backward"] == "single_sample" else case["size"],
        backward=case["backward"],
        norms=case["norms"],
        accumulate=case["accumulate"],
    )
    fixed_point = 1e-9 if case["accumulate"] == "exact" else 0.0  # truncation to C·2⁻⁴⁰
    assert_close(got, expected.clipped_sum, max(TOLERANCE[case["dtype"]], fixed_point))


def test_the_array_holds_every_pair_and_is_small():
    covered = set().union(*(pairs_of(case) for case in CASES))
    assert wanted_pairs() <= covered
    assert len(CASES) < 60
