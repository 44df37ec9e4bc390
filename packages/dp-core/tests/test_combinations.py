"""Every pair of choices equals the float64 oracle: a pairwise covering array over all of them.

Groups, budgets, rule, norm method, strategy, precision, checkpointing, sums, tying and the division
into micro-batches are independent choices. All of them together would be a hundred thousand cases;
this array holds every *pair* of values of two different choices at least once (strength 2; the
construction is greedy, and one test checks that no pair is missing). Pairs that cannot be built are
left out by `allowed`, and a test of its own shows how each of them is refused.

In bf16 and under autocast the oracle runs the same model one record at a time, so what differs is
the rounding of bf16 products, whose shapes and order differ. The norm is bounded strictly: each
record alone adds at most C(1 + 1e-6) in every precision.
"""

from __future__ import annotations

import itertools
import random
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from veilspan.core import (
    Automatic,
    ByPattern,
    Clip,
    Flat,
    PerBlock,
    PerLayer,
    PerParameter,
    PrivacyError,
    PrivateStep,
)
from veilspan.core.contributions import OuterProducts
from veilspan.core.testing import Oracle
from veilspan.core.testing.conformance import TOLERANCE, assert_close
from veilspan.core.testing.oracle import flat

CHOICES = {
    "groups": ["flat", "block", "layer", "parameter", "pattern"],
    "budgets": ["equal", "dimension"],
    "rule": [Clip(), Automatic(), Automatic(gamma=0.0)],
    "backward": ["auto", "single_sample", "per_sample", "bookkeeping", "two_pass", "per_layer"],
    "norms": ["auto", "direct", "gram"],
    "precision": ["float64", "float32", "bfloat16", "autocast"],
    "checkpointing": ["none", "reentrant", "non-reentrant", "selective"],
    "accumulate": ["fp32", "exact"],
    "tied": [False, True],
    "sizes": ["1 1 1 1 1", "5", "2 2 1", "4 0 1"],
}
WITHIN_LAYERS = ("layer", "parameter")
MATMULS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
C = 0.4
ROUNDING = torch.finfo(torch.bfloat16).eps
"""Relative error in bf16: its last place, to which the oracle rounds each record's gradient."""


def allowed(case: dict[str, object]) -> bool:
    """Return whether a (partial) case is one that can be built."""
    if case.get("backward") == "per_layer":
        return case.get("groups") in (None, *WITHIN_LAYERS)
    if case.get("backward") == "single_sample":
        return case.get("sizes") in (None, "1 1 1 1 1")
    return case.get("backward") != "two_pass" or case.get("checkpointing") != "selective"


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
        if self.checkpointing == "selective":
            contexts = partial(create_selective_checkpoint_contexts, MATMULS)
            return checkpoint(block, hidden, use_reentrant=False, context_fn=contexts)
        return checkpoint(partial(block), hidden, use_reentrant=self.checkpointing == "reentrant")

    def forward(self, ids):
        hidden = self.embed(ids)
        for block in (self.layers[0], self.layers[1], self.layers[1]):
            hidden = self.run(block, hidden)
        return self.head(hidden)


def clipping_of(case):
    options = {"clip_norm": C, "rule": case["rule"], "budgets": case["budgets"]}
    if case["groups"] == "pattern":
        patterns = {"blocks": "layers.*", "ends": "*"}
        return ByPattern(patterns=patterns, **options)
    kinds = {"flat": Flat, "block": PerBlock, "layer": PerLayer, "parameter": PerParameter}
    return kinds[case["groups"]](**options)


def losses_of(model, batch):
    """Return the loss of each record, its forward pass under autocast if the case says so."""
    # Without its cache: recomputing a block would cast weights again that another call had cast.
    with torch.autocast("cpu", torch.bfloat16, enabled=model.autocast, cache_enabled=False):
        logits = model(batch["ids"])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    entropy = nn.functional.cross_entropy(logits.mT, batch["ids"], reduction="none")
    return entropy.sum(1) * batch["weight"].to(entropy.dtype)


def model_of(case):
    torch.manual_seed(0)
    dtype = getattr(torch, case["precision"].replace("autocast", "float32"))
    model = Decoder(tied=case["tied"]).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.autocast = case["precision"] == "autocast"
    return model, {"ids": torch.randint(0, 11, (5, 7)), "weight": torch.ones(5)}


class Capture:
    """A noise source that keeps the sum before noise."""

    def __init__(self):
        self.sums = {}

    def add_(self, tensor, *, stddev, step, name, offset):
        self.sums[name] = tensor.clone()


def summed(model, batch, case):
    """Return the sum before noise, from micro-batches of the sizes of the case."""
    capture, parts = Capture(), [int(size) for size in case["sizes"].split()]
    step = PrivateStep(
        model,
        clipping=clipping_of(case),
        noise_multiplier=1.0,
        expected_batch_size=1.0,
        backward=case["backward"],
        norms=case["norms"],
        accumulate=case["accumulate"],
        noise=capture,
    )
    parts = [batch["ids"].split(parts), batch["weight"].split(parts)]
    with step:
        if case["checkpointing"] == "selective":  # its graphs can be differentiated only once
            step.probe(losses_of(model, batch | {"weight": torch.ones(5)}))
        for ids, weight in zip(*parts, strict=True):
            step.backward(losses_of(model, {"ids": ids, "weight": weight}))
    step.detach()
    model.zero_grad()
    return capture.sums


def assert_case(case):
    """Compare the sums of one case with the oracle, and each record's share with the threshold."""
    model, batch = model_of(case)
    expected = Oracle.of(model, losses_of, batch, clipping_of(case))
    model.checkpointing = case["checkpointing"]
    got = summed(model, batch, case)
    tolerance = TOLERANCE[torch.float64 if case["precision"] == "float64" else torch.float32]
    if case["precision"] in ("bfloat16", "autocast"):
        tolerance = ROUNDING
    fixed_point = 1e-9 if case["accumulate"] == "exact" else 0.0  # truncation to C·2⁻⁴⁰
    assert_close(got, expected.clipped_sum, max(tolerance, fixed_point))
    for b in range(5):
        alone = batch | {"weight": nn.functional.one_hot(torch.tensor(b), 5)}
        assert flat(summed(model, alone, case)).norm() <= C * (1 + 1e-6)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_combination_equals_the_oracle(case):
    assert_case(case)


# Models as small as these would keep every gradient: here all layers keep their factors, or some.
@pytest.mark.parametrize("widest", [100, 8], ids=["all", "some"])
@pytest.mark.parametrize(
    "case",
    [
        {**case, "backward": "per_sample", "norms": norms}
        for case in CASES
        for norms in ("auto", "gram")
        if case["backward"] in ("per_sample", "two_pass")
    ],
    ids=label,
)
def test_gradients_and_factors_kept_side_by_side_equal_the_oracle(case, widest, monkeypatch):
    monkeypatch.setattr("veilspan.core.plan.keeping_pays", lambda shape, *_: shape[2] <= widest)
    monkeypatch.setattr("veilspan.core.measures.table_pays", lambda *_: widest == 100)
    weighed, add_to = [], OuterProducts.add_to
    monkeypatch.setattr(OuterProducts, "add_to", lambda *a: (weighed.append(1), add_to(*a)))
    assert_case(case)
    assert bool(weighed) == (case["accumulate"] == "fp32")  # integers need each sample's gradient


PLAIN = {
    "groups": "flat", "budgets": "equal", "rule": Clip(), "backward": "per_sample", "norms": "auto",
    "precision": "float32", "checkpointing": "none", "accumulate": "fp32", "tied": False,
    "sizes": "5",
}  # fmt: skip


@pytest.mark.parametrize(
    ("choices", "error", "message"),
    [
        ({"backward": "per_layer"}, ValueError, "every group must end within a layer"),
        ({"backward": "single_sample"}, ValueError, "micro-batches of one record"),
        (
            {"backward": "two_pass", "checkpointing": "selective"},
            PrivacyError,
            "lets a graph be differentiated once",
        ),
    ],
    ids=str,
)
def test_pairs_that_are_left_out_are_refused_with_a_reason(choices, error, message):
    case = PLAIN | choices
    model, batch = model_of(case)
    model.checkpointing = case["checkpointing"]
    with pytest.raises(error, match=message):
        summed(model, batch, case)


def test_the_array_holds_every_pair_and_is_small():
    covered = set().union(*(pairs_of(case) for case in CASES))
    assert wanted_pairs() <= covered
    assert len(CASES) < 60
