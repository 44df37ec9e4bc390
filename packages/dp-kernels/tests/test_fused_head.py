"""Linear heads with cross entropy: losses, norms and clipped sums without logits."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from veilspan.kernels import fused_head
from veilspan.kernels.testing import DEVICE, Fence, random

C = torch.float64
IGNORED = -100
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (3, 7, 33, 65), (2, 6, 16, 130)]  # B, T, D, V


@dataclass
class Exact:
    loss_B: Tensor
    grad_hidden_BTD: Tensor
    grad_weight_BVD: Tensor


def operands(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    batch, tokens, width, vocabulary = shape
    labels = torch.randint(
        vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(batch)
    )
    labels[0, tokens // 2 + 1 :] = IGNORED  # samples have different numbers of tokens
    hidden = random(batch, tokens, width, dtype=dtype, seed=1)
    return hidden, random(vocabulary, width, dtype=dtype, seed=2), labels.to(DEVICE)


def exact(hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str = "mean") -> Exact:
    """Differentiate each sample's loss on its own, in fp64."""
    losses, backs, slopes = [], [], []
    for act, wanted in zip(hidden.double(), labels, strict=True):
        leaves = act.clone().requires_grad_(), weight.double().clone().requires_grad_()
        logits = leaves[0] @ leaves[1].mT
        loss = F.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum")
        if reduction == "mean":
            loss = loss / max(1, int((wanted != IGNORED).sum()))
        back, slope = torch.autograd.grad(loss, leaves)
        for found, one in zip((losses, backs, slopes), (loss.detach(), back, slope), strict=True):
            found.append(one)
    return Exact(torch.stack(losses), torch.stack(backs), torch.stack(slopes))


def assert_near(found: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    rtol = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}.get(dtype, 1e-12)
    assert float((found.double() - right).norm()) <= rtol * float(right.norm()) + 1e-12


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, C])
@pytest.mark.parametrize("shape", SHAPES)
def test_all_results_equal_autograd_of_each_sample(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    chunk: int | None,
    keep: bool,
    fence: Fence,
) -> None:
    hidden, weight, labels = (fence(tensor) for tensor in operands(shape, dtype))
    right = exact(hidden, weight, labels)
    found = fused_head(hidden, weight, labels, chunk=chunk, keep_gradient=keep)
    assert found.loss_B.dtype == (C if dtype == C else torch.float32)
    assert found.grad_hidden_BTD.dtype == dtype
    assert_near(found.loss_B, right.loss_B, dtype)
    assert_near(found.grad_hidden_BTD, right.grad_hidden_BTD, dtype)
    assert_near(found.sq_norm_B, right.grad_weight_BVD.square().sum((1, 2)), dtype)
    if keep:
        assert found.grad_weight_BVD is not None
        assert_near(found.grad_weight_BVD, right.grad_weight_BVD, dtype)
    factor = torch.linspace(0.0, 1.0, shape[0], device=DEVICE)
    total = fence(random(*weight.shape, seed=5))
    summed = total.double() + torch.einsum("b,bvd->vd", factor.double(), right.grad_weight_BVD)
    found.add_clipped_(factor, total)
    assert_near(total, summed, torch.float32 if dtype == C else dtype)


def test_a_sum_does_not_divide_by_the_tokens() -> None:
    hidden, weight, labels = operands(SHAPES[2], torch.float32)
    right = exact(hidden, weight, labels, "sum")
    found = fused_head(hidden, weight, labels, reduction="sum")
    assert_near(found.loss_B, right.loss_B, torch.float32)
    assert_near(found.sq_norm_B, right.grad_weight_BVD.square().sum((1, 2)), torch.float32)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_that_of_what_is_added(keep: bool, dtype: torch.dtype) -> None:
    hidden, weight, labels = operands(SHAPES[2], dtype)
    found = fused_head(hidden, weight, labels, chunk=2, keep_gradient=keep)
    total = torch.zeros(weight.shape, device=DEVICE)
    added = found.add_clipped_(torch.ones(3, device=DEVICE), total)
    assert torch.equal(added, found.sq_norm_B)
    bound = 0.5 * found.sq_norm_B.sqrt()
    factor = (0.5 * (1 - 2.0**-12)) * torch.ones_like(bound)
    assert bool((found.add_clipped_(factor, total).sqrt() <= bound).all())


@pytest.mark.parametrize("keep", [True, False])
def test_fixed_point_totals_are_the_same_in_every_order(keep: bool) -> None:
    hidden, weight, labels = operands(SHAPES[2], torch.bfloat16)
    totals = torch.zeros(2, *weight.shape, dtype=torch.int64, device=DEVICE)
    factor = torch.tensor([0.3, 0.5, 0.7], device=DEVICE)
    for total, order in zip(totals, ([0, 1, 2], [2, 0, 1]), strict=True):
        found = fused_head(hidden[order], weight, labels[order], chunk=2, keep_gradient=keep)
        found.add_clipped_(factor[order], total, grain=2.0**-40)
    assert torch.equal(totals[0], totals[1])
    assert bool(totals.any())


def test_a_sample_does_not_depend_on_the_others() -> None:
    hidden, weight, labels = operands(SHAPES[2], torch.float32)
    whole = fused_head(hidden, weight, labels, chunk=2)
    labels[1:, 2:], hidden[2] = IGNORED, float("nan")
    spoiled = fused_head(hidden, weight, labels, chunk=2)
    assert whole.grad_weight_BVD is not None
    assert spoiled.grad_weight_BVD is not None
    assert torch.equal(whole.loss_B[0], spoiled.loss_B[0])
    assert torch.equal(whole.grad_hidden_BTD[0], spoiled.grad_hidden_BTD[0])
    assert torch.equal(whole.grad_weight_BVD[0], spoiled.grad_weight_BVD[0])
    assert bool(spoiled.sq_norm_B[2].isnan())


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, C])
def test_a_sample_without_tokens_has_loss_and_gradient_zero(keep: bool, dtype: torch.dtype) -> None:
    hidden, weight, labels = operands(SHAPES[1], dtype)
    labels[1], hidden[1] = IGNORED, float("nan")  # what does not count may hold anything
    found = fused_head(hidden, weight, labels, chunk=2, keep_gradient=keep)
    assert float(found.loss_B[1]) == float(found.sq_norm_B[1]) == 0.0
    assert not found.grad_hidden_BTD[1].any()
    total = torch.zeros(weight.shape, device=DEVICE)
    found.add_clipped_(torch.tensor([0.0, 1.0], device=DEVICE), total)
    assert not total.any()


@pytest.mark.parametrize("keep", [True, False])
def test_a_zero_factor_drops_a_gradient_that_is_not_finite(keep: bool) -> None:
    hidden, weight, labels = operands(SHAPES[1], torch.float32)
    hidden[1] = float("inf")
    found = fused_head(hidden, weight, labels, keep_gradient=keep)
    total = torch.zeros(weight.shape, device=DEVICE)
    added = found.add_clipped_(torch.tensor([1.0, 0.0], device=DEVICE), total)
    assert bool(total.isfinite().all())
    assert float(added[1]) == 0.0


def test_operands_may_have_any_strides() -> None:
    hidden, weight, labels = operands((2, 6, 16, 130), torch.float32)
    right = fused_head(hidden, weight, labels)
    turned = hidden.transpose(0, 1).contiguous().transpose(0, 1)
    found = fused_head(turned, weight.mT.contiguous().mT, labels.int())
    assert_near(found.grad_hidden_BTD, right.grad_hidden_BTD.double(), torch.float32)
    assert_near(found.sq_norm_B, right.sq_norm_B, torch.float32)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 4)])
def test_nothing_has_loss_and_norm_zero(shape: tuple[int, int, int, int], keep: bool) -> None:
    batch, tokens, width, vocabulary = shape
    hidden, weight = random(batch, tokens, width), random(vocabulary, width)
    labels = torch.zeros(batch, tokens, dtype=torch.int64, device=DEVICE)
    found = fused_head(hidden, weight, labels, keep_gradient=keep)
    assert found.sq_norm_B.tolist() == [0.0] * batch
    assert found.grad_hidden_BTD.shape == hidden.shape
    found.add_clipped_(torch.ones(batch, device=DEVICE), torch.zeros_like(weight))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_BTD": torch.zeros(2, 4)}, r"hidden_BTD has shape \[2, 4\]"),
        ({"weight_VD": torch.zeros(5, 3)}, r"weight_VD has shape \[5, 3\]; it must be \[V, 4\]"),
        ({"weight_VD": torch.zeros(5, 4).half()}, "weight_VD is torch.float16; it must be one of"),
        ({"weight_VD": torch.zeros(0, 4)}, "weight_VD has no rows"),
        ({"weight_VD": torch.zeros(5, 4, device="meta")}, "weight_VD is on meta"),
        ({"labels_BT": torch.zeros(2, 2).long()}, r"labels_BT has shape \[2, 2\]"),
        ({"labels_BT": torch.zeros(2, 3)}, "labels_BT is torch.float32"),
        (
            {"labels_BT": torch.tensor([[0, 5, -1], [-100, 4, 7]])},
            r"labels_BT: 3 of 6 positions must be in \[0, 5\) or -100",
        ),
        ({"chunk": 0}, "chunk is 0; it must be at least 1 token"),
        ({"reduction": "none"}, "reduction is 'none'; it must be 'mean' or 'sum'"),
    ],
)
def test_bad_input_is_named(change: dict, message: str, device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("on a GPU a device-side assertion reports labels, which ends the process")
    arguments = {
        "hidden_BTD": torch.zeros(2, 3, 4),
        "weight_VD": torch.zeros(5, 4),
        "labels_BT": torch.zeros(2, 3, dtype=torch.int64),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        fused_head(**arguments)


def test_bad_factors_are_named() -> None:
    found = fused_head(*operands(SHAPES[1], torch.float32))
    total = torch.zeros(7, 5, device=DEVICE)
    with pytest.raises(ValueError, match=r"factor_B has shape \[3\]; it must be \[2\]"):
        found.add_clipped_(torch.ones(3, device=DEVICE), total)
    with pytest.raises(ValueError, match=r"factor_B is torch.int64"):
        found.add_clipped_(torch.ones(2, device=DEVICE).long(), total)


def test_torch_compile_sees_the_ops_without_graph_breaks() -> None:
    hidden, weight, labels = operands(SHAPES[1], torch.float32)
    target, scale = labels.clamp(min=-1), torch.ones(2, device=DEVICE)
    op = torch.ops.veilspan.fused_head.default
    compiled = torch.compile(op, backend="eager", fullgraph=True)
    arguments = (hidden, weight, target, scale, 2, True)
    for one, two in zip(compiled(*arguments), op(*arguments), strict=True):
        assert torch.equal(one, two)
    torch.library.opcheck(op, arguments)
    torch.library.opcheck(
        torch.ops.veilspan.fused_head_gradient.default, (hidden[0], weight, target[0], scale[0], 2)
    )
