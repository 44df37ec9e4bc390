"""Pitfalls of records: what one of them does to the numbers of a batch, and to the others.

A test's number is the row of the table of sharp edges.
"""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from veilspan.core import (
    Flat,
    GaussianNoise,
    PerLayer,
    PrivacyError,
    PrivateStep,
    UnsupportedModelError,
    new_key,
)
from veilspan.core.norms import BlockedKernel
from veilspan.core.support import preflight
from veilspan.core.testing import Oracle
from veilspan.core.testing.conformance import assert_close, clipped_sum
from veilspan.core.testing.oracle import batch_size, flat

TAPPED = ["per_sample", "bookkeeping", "two_pass", "per_layer"]
STRATEGIES = ["single_sample", *TAPPED]

under_every_strategy = pytest.mark.parametrize("backward", STRATEGIES)
under_every_tap = pytest.mark.parametrize("backward", TAPPED)


def clipping_for(backward):
    """Return flat clipping, or layer-wise where the strategy can do no other."""
    return (PerLayer if backward == "per_layer" else Flat)(clip_norm=1.0)


def attach(model, backward="per_sample", *, noise_multiplier=0.0, **options):
    return PrivateStep(
        model,
        clipping=clipping_for(backward),
        noise_multiplier=noise_multiplier,
        expected_batch_size=1.0,
        backward=backward,
        **options,
    )


def square_losses(model, x):
    return model(x).square().flatten(1).sum(1)


def batch_losses(model, batch):
    return square_losses(model, batch["x"])


def total(model, losses, batch, backward, **options):
    """Return the sum before noise, all records in one micro-batch where the strategy can."""
    size = 1 if backward == "single_sample" else max(1, batch_size(batch))
    return clipped_sum(
        model,
        losses,
        batch,
        clipping=clipping_for(backward),
        size=size,
        backward=backward,
        **options,
    )


@under_every_tap
def test_pitfall_07_records_flattened_into_tokens_are_refused(backward):
    class Flatten(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 1)

        def forward(self, x):
            hidden = self.one(x)
            return self.two(hidden.flatten(0, 1)).view(len(x), -1)

    model = Flatten()
    step = attach(model, backward)
    with (
        pytest.raises(PrivacyError, match=r"Module 'two' received an input of shape \(10, 3\)"),
        step,
    ):
        step.backward(square_losses(model, torch.randn(2, 5, 3)))


class Odd(nn.Module):
    """Embedding, norm and head of sizes that no block size divides."""

    def __init__(self, width):
        super().__init__()
        self.embed, self.norm = nn.Embedding(67, width), nn.LayerNorm(width)
        self.mix, self.lm_head = nn.Linear(width, width), nn.Linear(width, 67, bias=False)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, ids):
        return self.lm_head(self.mix(self.norm(self.embed(ids))))


@pytest.fixture
def poisoned_memory():
    """Memory that torch hands out uninitialised is full of NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("accumulate", ["fp32", "exact"])
@pytest.mark.parametrize("norms", ["direct", "gram"])
@under_every_strategy
def test_pitfall_15_no_result_depends_on_memory_that_nobody_wrote(backward, norms, accumulate):
    torch.manual_seed(0)
    for width, length in ((1, 1), (3, 63), (65, 2), (129, 65), (17, 257)):
        model, batch = Odd(width).double(), {"ids": torch.randint(0, 67, (3, length))}
        expected = Oracle.of(model, entropies, batch, clipping_for(backward)).clipped_sum
        options = {"norms": norms, "accumulate": accumulate}
        assert_close(total(model, entropies, batch, backward, **options), expected, 1e-9)


@pytest.mark.usefixtures("poisoned_memory")
@under_every_strategy
def test_pitfall_15_buffers_of_an_earlier_micro_batch_leave_nothing_behind(backward):
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    step, x = attach(model, backward), torch.randn(7, 4, 5, dtype=torch.float64)
    expected = Oracle.of(model, batch_losses, {"x": x[:2]}, clipping_for(backward)).clipped_sum
    size = 1 if backward == "single_sample" else 5
    with step:
        for part in [*(x[2:] * math.nan).split(size), *x[:2].split(min(size, 2))]:
            step.backward(square_losses(model, part))
    got = {n: p.grad for n, p in step.parameters.items() if p.grad is not None}
    assert_close(got, expected, 1e-10)


class FailsOnce:
    """A kernel whose second answer is an error, as when memory runs out half-way."""

    def __init__(self):
        self.calls, self.inner = 0, BlockedKernel()

    def __getattr__(self, name):
        def answer(*args, **options):
            self.calls += 1
            if self.calls == 2:
                raise torch.OutOfMemoryError("out of memory")
            return getattr(self.inner, name)(*args, **options)

        return answer


@under_every_tap
def test_pitfall_17_a_micro_batch_that_failed_half_way_cannot_be_tried_again(backward):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    step, x = attach(model, backward, kernel=FailsOnce()), 10 * torch.randn(2, 4, 3)
    with pytest.raises(PrivacyError, match="a second try would count its records twice"), step:
        with pytest.raises(torch.OutOfMemoryError):
            step.backward(square_losses(model, x))
        step.backward(square_losses(model, x))
    assert all(p.grad is None for p in model.parameters())
    with step:
        step.backward(square_losses(model, x))
    assert model[0].weight.grad is not None


@under_every_tap
def test_pitfall_17_a_graph_that_outlives_its_micro_batch_adds_nothing(backward):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(3, 1), nn.Linear(3, 1)

        def forward(self, x, right):
            return (self.right if right else self.left)(x)

    model = Branch()
    step = attach(model, backward)
    with pytest.raises(PrivacyError, match=r"outside of step\.backward"), step:
        small = model(torch.randn(1, 3) / 100, False).sum(1)
        large = model(torch.randn(1, 3) * 100, True).sum(1)  # not clipped by the factor of `small`
        step.backward(small)
        step.backward(large)


class Positions(nn.Module):
    """Adds positions that the batch shares: looked up once, or a bare parameter."""

    def __init__(self, kind):
        super().__init__()
        self.tokens, self.norm, self.head = nn.Embedding(7, 6), nn.LayerNorm(6), nn.Linear(6, 7)
        table = nn.Parameter(0.1 * torch.randn(1, 9, 6))
        self.places = table if kind == "parameter" else nn.Embedding(9, 6)

    def forward(self, ids):
        places = self.places
        if isinstance(places, nn.Embedding):
            places = places(torch.arange(ids.shape[1])[None])
        return self.head(self.norm(self.tokens(ids) + places))


def entropies(model, batch):
    logits, target = model(batch["ids"])[:, :-1], batch["ids"][:, 1:]
    return nn.functional.cross_entropy(logits.mT, target, reduction="none").sum(1)


@pytest.mark.parametrize("kind", ["embedding", "parameter"])
@under_every_strategy
def test_pitfall_24_positions_broadcast_over_the_batch_are_counted_per_record(backward, kind):
    torch.manual_seed(0)
    model, batch = Positions(kind).double(), {"ids": torch.randint(0, 7, (4, 9))}
    expected = Oracle.of(model, entropies, batch, clipping_for(backward))
    got = total(model, entropies, batch, backward)
    assert_close(got, expected.clipped_sum, 1e-10)


COUPLED = {
    "normalised over the batch": lambda out: out.square().sum(1) / out.square().sum(),
    "in-batch negatives": lambda out: nn.functional.cross_entropy(
        out @ out.T, torch.arange(len(out)), reduction="none"
    ),
    "auxiliary loss": lambda out: out.square().sum(1) + 0.1 * out.mean().square(),
}


@pytest.mark.parametrize("loss", COUPLED)
@under_every_tap
def test_pitfall_37_losses_that_couple_records_are_refused(backward, loss):
    model = nn.Linear(3, 2)
    step = attach(model, backward)
    with pytest.raises(PrivacyError, match="depends on other records"), step:
        step.backward(COUPLED[loss](model(torch.randn(3, 3))))


class OneRowForAll(nn.Module):
    """Takes of the first row what all records share: right in the batch's own shapes alone."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(7, 6), nn.Embedding(9, 6)
        self.head = nn.Linear(6, 7)

    def forward(self, ids):
        places = self.places(torch.arange(ids.shape[1])[None])[0]
        return self.head(self.tokens(ids) + places)


@under_every_tap
def test_pitfall_37_one_row_that_serves_every_record_is_refused(backward):
    """Else its gradients, of all records, would count as those of the first one."""
    model, ids = OneRowForAll(), torch.randint(0, 7, (4, 9))
    step = attach(model, backward)
    with pytest.raises(PrivacyError, match=r"loss of record 3 depends .* module 'places'"), step:
        step.backward(entropies(model, {"ids": ids}))


@under_every_tap
def test_pitfall_37_rows_that_fill_a_micro_batch_hide_no_coupling(backward):
    model, ids = OneRowForAll(), torch.randint(0, 7, (4, 9))
    is_record_B = torch.tensor([True, True, False, False])
    step = attach(model, backward)
    with pytest.raises(PrivacyError, match="loss of record 1 depends"), step:
        step.backward(entropies(model, {"ids": ids}), is_record_B)


class Rescaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        hidden, ctx.dims = args
        return hidden.clone()

    @staticmethod
    def backward(ctx, *grad_outputs):
        (grad,) = grad_outputs
        return grad / torch.linalg.vector_norm(grad, dim=ctx.dims, keepdim=True), None


class RescalesGradients(nn.Module):
    """Scales the gradient of what its first layer returns to norm one, over `dims`."""

    def __init__(self, how, dims, *, alone=False):
        super().__init__()
        self.first = nn.MultiheadAttention(6, 2, batch_first=True) if alone else nn.Linear(6, 6)
        self.last, self.how, self.dims, self.alone = nn.Linear(6, 2), how, dims, alone
        if how == "module":
            self.last.register_full_backward_hook(lambda _, grads, __: (self._scale(grads[0]),))

    def _scale(self, grad):
        return grad / torch.linalg.vector_norm(grad, dim=self.dims, keepdim=True)

    def forward(self, x):
        hidden = self.first(x, x, x)[0] if self.alone else self.first(x)
        if self.how == "function":
            hidden = Rescaled.apply(hidden, self.dims)
        elif self.how == "tensor" and hidden.requires_grad:
            hidden.register_hook(self._scale)
        return self.last(hidden)


@pytest.mark.parametrize("alone", [False, True], ids=["layer", "records alone"])
@pytest.mark.parametrize("how", ["tensor", "module", "function"])
@under_every_tap
def test_pitfall_37_gradients_that_are_scaled_over_the_batch_are_refused(backward, how, alone):
    """No loss reaches another record, but the gradient of one is scaled by those of others."""
    model, x = RescalesGradients(how, (0, 1, 2), alone=alone), torch.randn(3, 4, 6)
    step = attach(model, backward)
    with pytest.raises(PrivacyError, match="at the output of module 'first' depends"), step:
        step.backward(square_losses(model, x))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("how", ["tensor", "module", "function"])
@under_every_tap
def test_gradients_that_are_scaled_record_by_record_are_exact(backward, how):
    model = RescalesGradients(how, (1, 2)).double()
    batch = {"x": torch.randn(5, 4, 6, dtype=torch.float64)}
    expected = Oracle.of(model, batch_losses, batch, clipping_for(backward)).clipped_sum
    assert_close(total(model, batch_losses, batch, backward), expected, 1e-10)


@pytest.mark.parametrize("backward", ["auto", *STRATEGIES])
def test_pitfall_37_batch_norm_is_refused_under_every_strategy(backward):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    with pytest.raises(UnsupportedModelError, match=r"Module '1' is BatchNorm1d"):
        attach(model, backward)


@pytest.mark.parametrize("wrapper", [DataParallel, DistributedDataParallel])
@under_every_strategy
def test_pitfall_37_wrappers_that_average_records_over_ranks_are_refused(
    backward, wrapper, tmp_path
):
    meeting = f"file://{tmp_path / 'ranks'}"
    dist.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    try:
        model = wrapper(nn.Linear(3, 3))
    finally:
        dist.destroy_process_group()
    with pytest.raises(UnsupportedModelError, match=f"is {wrapper.__name__}, which averages"):
        attach(model, backward)


class Capacity(nn.Module):
    """A router that serves the three tokens of the whole batch with the highest score."""

    def __init__(self):
        super().__init__()
        self.expert = nn.Linear(4, 4)

    def forward(self, x):
        score_BT = x.detach().sum(-1)
        served = score_BT >= score_BT.flatten().topk(3).values.min()
        return x + self.expert(x) * served[..., None]


def test_pitfall_38_a_router_that_drops_tokens_for_those_of_others_is_found():
    x = torch.randn(2, 3, 4)
    x[1] += 10.0  # the other record takes the expert's whole capacity
    with pytest.raises(PrivacyError, match="the records of a micro-batch couple"):
        preflight(attach(Capacity()), batch_losses, {"x": x})


class Drops(nn.Module):
    """Dropout between two layers, recomputed in the backward pass or not."""

    def __init__(self, recompute, *, use_reentrant=False, preserve_rng_state=True):
        super().__init__()
        self.up, self.drop, self.down = nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 4)
        self.recompute, self.how = recompute, (use_reentrant, preserve_rng_state)

    def body(self, x):
        return self.down(self.drop(torch.tanh(self.up(x))))

    def forward(self, x):
        if not self.recompute:
            return self.body(x)
        reentrant, preserve = self.how
        return checkpoint(self.body, x, use_reentrant=reentrant, preserve_rng_state=preserve)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("norms", ["direct", "gram"])
@under_every_tap
def test_pitfall_40_norm_and_sum_see_the_same_dropout_masks(backward, norms, recompute):
    torch.manual_seed(0)
    model, batch = Drops(recompute).double(), {"x": 9 * torch.randn(1, 3, 4, dtype=torch.float64)}
    alone = total(model, batch_losses, batch, backward, norms=norms)
    assert flat(alone).norm().item() == pytest.approx(1.0, rel=1e-9)  # the clip norm, not less


@pytest.mark.parametrize("use_reentrant", [False, True])
@under_every_tap
def test_pitfall_40_masks_that_are_drawn_anew_in_the_backward_pass_hide_no_norm(
    backward, use_reentrant
):
    torch.manual_seed(0)
    model = Drops(True, use_reentrant=use_reentrant, preserve_rng_state=False).double()
    x = 9 * torch.randn(1, 3, 4, dtype=torch.float64)
    if backward == "two_pass":  # the sum would be of other masks than the norm
        step = attach(model, backward)
        with pytest.raises(PrivacyError, match="drew random numbers"), step:
            step.backward(square_losses(model, x.requires_grad_()))
        return
    alone = total(model, batch_losses, {"x": x.requires_grad_()}, backward)
    assert flat(alone).norm().item() == pytest.approx(1.0, rel=1e-9)


GENERATORS = {"random": random.random, "numpy.random": np.random.random_sample}


@pytest.mark.parametrize("generator", GENERATORS)
def test_pitfall_40_random_numbers_of_other_generators_are_not_drawn_anew(generator):
    """Checkpointing keeps the state of torch alone; each pass scaled the branch by a new number."""
    first, last = nn.Linear(4, 4), nn.Linear(4, 4)

    def branch(x):
        return first(x) * GENERATORS[generator]()

    def losses(x):
        return last(checkpoint(branch, x, use_reentrant=True)).square().flatten(1).sum(1)

    step, x = attach(nn.Sequential(first, last), "two_pass"), torch.randn(1, 3, 4)
    with pytest.raises(PrivacyError, match="drew random numbers"), step:
        step.backward(losses(x.requires_grad_()))


class Own(nn.Module):
    """A layer without a rule, whose records run alone."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return torch.tanh(x @ self.table)


class RunsAgain(nn.Module):
    """A block that activation checkpointing runs again, under numbers that torch does not keep."""

    def __init__(self, how, use_reentrant):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.body: nn.Module = nn.Linear(4, 4)
        self.how, self.use_reentrant, self.runs = how, use_reentrant, 0
        self.generator = torch.Generator().manual_seed(0)

    def block(self, x):
        self.runs += 1
        if self.how == "generator":
            keep = torch.rand(x.shape, generator=self.generator) < 0.9
            return self.body(x * keep / 0.9)
        if self.how == "count":
            return self.body(x) / self.runs
        for _ in range(self.runs if self.how == "loop" else 1):
            x = x + self.body(x)
        return x if self.how == "loop" or self.runs % 2 else x + self.last(x)

    def forward(self, x):
        h = self.first(x)
        return self.last(checkpoint(self.block, h, use_reentrant=self.use_reentrant))


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("how", "use_reentrant"), [("generator", False), ("generator", True), ("count", True)]
)
@under_every_tap
def test_pitfall_40_a_block_that_computes_something_else_again_hides_no_norm(
    backward, how, use_reentrant, dtype, alone
):
    """A dropout mask from a generator of the model's own, say: one record reached 1.15 C."""
    torch.manual_seed(0)
    model, x = RunsAgain(how, use_reentrant).to(dtype), 9 * torch.randn(1, 3, 4, dtype=dtype)
    if alone:
        model.body = Own().to(dtype)
    if backward == "two_pass":
        step = attach(model, backward)
        with pytest.raises(PrivacyError, match="did not repeat the first"), step:
            step.backward(square_losses(model, x))
        return
    length = flat(total(model, batch_losses, {"x": x}, backward)).norm().item()
    assert length <= 1.0 + 1e-6


@pytest.mark.parametrize("how", ["loop", "branch"])
@under_every_tap
def test_pitfall_40_a_layer_that_is_run_more_often_again_is_refused(backward, how):
    """Whoever waits for one use takes the norm of each of two, and adds both: up to √2 · C."""
    torch.manual_seed(0)
    model = RunsAgain(how, True).double()
    step = attach(model, backward)
    with pytest.raises(PrivacyError, match=r"more often than the forward pass called it"), step:
        step.backward(square_losses(model, torch.randn(1, 3, 4, dtype=torch.float64)))


@pytest.mark.parametrize("accumulate", ["fp32", "exact"])
@pytest.mark.parametrize("present", [False, True])
def test_pitfall_52_last_bits_of_a_value_near_zero_do_not_tell_the_sum(present, accumulate):
    """Noise in fp32 would come in steps of 2⁻²⁴ around -1, and so would its sum with 1."""
    model, near = nn.Linear(1, 2**20, bias=False), []
    step = PrivateStep(
        model,
        clipping=Flat(clip_norm=2048.0),  # the gradient, all ones, has the norm 1024
        noise_multiplier=1 / 2048,
        expected_batch_size=1.0,
        backward="per_sample",
        accumulate=accumulate,
        noise=GaussianNoise(new_key()),
    )
    for _ in range(4):
        with step:
            if present:
                step.backward(model(torch.ones(1, 1)).sum(1))
        values = model.weight.grad.flatten()
        near.append(values[(values.abs() < 2**-12) & (values.abs() > 2**-20)])
        model.zero_grad()
    bits = torch.cat(near).view(torch.int32)
    assert len(bits) > 400
    for bit in range(4):
        ones = (bits >> bit & 1).double().mean().item()
        assert abs(ones - 0.5) < 5 * 0.5 / math.sqrt(len(bits))
