"""`torch.compile` of a model that trains privately: the same clipped sums, and no graph breaks."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.utils.checkpoint import checkpoint

from veilspan.core import Flat, PerLayer, PrivacyError, PrivateStep
from veilspan.core.testing import Oracle
from veilspan.core.testing.conformance import assert_close, clipped_sum

# What dynamo does to torch itself while it traces; the second is how it traces any Function.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be"),
]

TAPPED = ("per_sample", "two_pass", "bookkeeping", "per_layer")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(nn.functional.silu(self.up(self.norm(x))))


class Stack(nn.Module):
    """A little decoder; `again` runs its first block a second time, `recompute` checkpoints."""

    def __init__(self, *, again=False, recompute=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList([Block(6), Block(6)])
        self.head = nn.Linear(6, 11, bias=False)
        self.again, self.recompute = again, recompute

    def forward(self, ids):
        hidden = self.embed(ids)
        for block in [*self.blocks, *([self.blocks[0]] if self.again else [])]:
            if self.recompute is None:
                hidden = block(hidden)
            else:
                hidden = checkpoint(block, hidden, use_reentrant=self.recompute == "reentrant")
        return self.head(hidden)


def squares(model, batch):
    return model(batch["ids"]).square().flatten(1).sum(1)


def compiled_equals_oracle(model, strategy, *, backend="aot_eager", fullgraph=True, size=2):
    """Compare with the float64 oracle of the model before compilation and checkpointing."""
    model, recompute, model.recompute = model.double(), model.recompute, None
    batch = {"ids": torch.randint(11, (5, 4), generator=torch.Generator().manual_seed(1))}
    clipping = (PerLayer if strategy == "per_layer" else Flat)(clip_norm=3.0)
    expected = Oracle.of(model, squares, batch, clipping).clipped_sum
    model.recompute = recompute
    for block in model.blocks if fullgraph else [model]:
        block.compile(fullgraph=fullgraph, backend=backend)
    options = {"clipping": clipping, "size": size, "backward": strategy}
    assert_close(clipped_sum(model, squares, batch, **options), expected, 1e-9)


@pytest.mark.parametrize("strategy", ["single_sample", *TAPPED])
def test_a_compiled_block_has_no_graph_break_and_clips_exactly(strategy):
    compiled_equals_oracle(Stack(), strategy, size=1 if strategy == "single_sample" else 2)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] >= 1, "nothing was compiled"
    assert not counters["graph_break"]


@pytest.mark.parametrize("strategy", ["two_pass", "bookkeeping", "per_sample"])
def test_inductor_reuses_no_memory_that_a_strategy_keeps(strategy, monkeypatch):
    monkeypatch.setattr("veilspan.core.plan.keeping_pays", lambda *_: True)
    compiled_equals_oracle(Stack(), strategy, backend="inductor")


@pytest.mark.parametrize("strategy", TAPPED)
def test_a_block_used_twice_is_counted_twice(strategy):
    compiled_equals_oracle(Stack(again=True), strategy)


@pytest.mark.parametrize("recompute", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("strategy", ["per_sample", "two_pass", "bookkeeping"])
def test_checkpointing_around_a_compiled_block_counts_no_use_twice(recompute, strategy):
    compiled_equals_oracle(Stack(recompute=recompute), strategy)


@pytest.mark.parametrize("strategy", ["single_sample", "per_sample", "two_pass"])
def test_a_whole_compiled_model_clips_exactly(strategy):
    size = 1 if strategy == "single_sample" else 2
    compiled_equals_oracle(Stack(), strategy, fullgraph=False, size=size)


class InPlace(Block):
    def forward(self, x):
        hidden = super().forward(x)
        return self.up(hidden).relu_()[..., : hidden.shape[-1]]


def test_what_a_layer_of_a_compiled_block_returns_may_be_written_in_place():
    model = Stack()
    model.blocks[1] = InPlace(6)
    compiled_equals_oracle(model, "two_pass")


def test_a_compiled_model_trains_plainly_after_detach():
    model = Stack()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    expected = torch.autograd.grad(squares(model, {"ids": ids}).sum(), [*model.parameters()])
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    step = PrivateStep(
        model, clipping=Flat(clip_norm=1.0), noise_multiplier=0.0, expected_batch_size=2
    )
    with step:
        step.backward(squares(model, {"ids": ids}))
    step.detach()
    model.zero_grad()
    squares(model, {"ids": ids}).sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_pitfall_37_a_loss_that_reaches_an_earlier_micro_batch_is_refused(backend):
    model = Stack()
    if backend:
        for block in model.blocks:
            block.compile(fullgraph=True, backend=backend)
    step = PrivateStep(
        model,
        clipping=Flat(clip_norm=1.0),
        noise_multiplier=0.0,
        expected_batch_size=2,
        backward="per_sample",
    )
    first, second = {"ids": torch.tensor([[1, 2], [3, 4]])}, {"ids": torch.tensor([[5, 6], [7, 8]])}
    with pytest.raises(PrivacyError, match="earlier micro-batch"), step:
        carried = squares(model, first)
        step.backward(squares(model, second))
        step.backward(squares(model, second) + carried)


@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
@pytest.mark.usefixtures("genuine_float64")
def test_blocks_of_hugging_face_compile_without_a_break(
    family, make_model, make_batch, compute_losses
):
    model, batch = make_model(family), make_batch(3, 7)
    clipping = Flat(clip_norm=2.0)
    expected = Oracle.of(model, compute_losses, batch, clipping).clipped_sum
    blocks = model.transformer.h if family == "gpt2" else model.model.layers
    for block in blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    options = {"clipping": clipping, "size": 3, "backward": "bookkeeping"}
    assert_close(clipped_sum(model, compute_losses, batch, **options), expected, 1e-9)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
