"""Backward passes of RMSNorm and LayerNorm, and what they say of each sample."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from veilspan.kernels import layer_norm_backward, rms_norm_backward
from veilspan.kernels.ops.affine_norm import _backward
from veilspan.kernels.testing import Fence, random, sparse

SHAPES = [(1, 1, 1), (2, 1, 130), (1, 33, 3), (3, 17, 64), (2, 40, 65)]
EPS = 1e-5
C = torch.float64
Exact = tuple[Tensor, Tensor, Tensor]


def tolerance(dtype: torch.dtype) -> float:
    return {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 1e-5}.get(dtype, 1e-12)


def operands(
    shape: tuple[int, int, int], dtype: torch.dtype, fence: Callable[[Tensor], Tensor] = torch.clone
) -> tuple[Tensor, Tensor, Tensor]:
    x = fence(random(*shape, dtype=dtype, seed=1) * 3.0 + 0.5)
    weight = fence(random(shape[2], dtype=dtype, seed=2))
    return x, weight, fence(random(*shape, dtype=dtype, seed=3))


def exact(x: Tensor, weight: Tensor, grad: Tensor, *, offset: float, centred: bool) -> Exact:
    """Return the gradients of x, of the gain and of the shift by autograd in fp64."""
    x, weight = x.double().clone().requires_grad_(), weight.double() + offset
    gains = weight.expand(x.shape[0], -1).contiguous().requires_grad_()
    shifts = torch.zeros_like(gains, requires_grad=True)
    if centred:
        unit = F.layer_norm(x, x.shape[2:], eps=EPS)
    else:
        unit = x / (x.square().mean(2, keepdim=True) + EPS).sqrt()
    y = unit * gains[:, None] + shifts[:, None]
    back, gain, shift = torch.autograd.grad(y, (x, gains, shifts), grad.double())
    return back, gain, shift


def assert_near(found: Tensor, right: Tensor, rtol: float) -> None:
    error = (found.double() - right).norm()
    assert float(error) <= rtol * float(right.norm()) + 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, C])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_equals_autograd_of_each_sample(
    shape: tuple[int, int, int], dtype: torch.dtype, offset: float, fence: Fence
) -> None:
    x, weight, grad = operands(shape, dtype, fence)
    back, gain, _ = exact(x, weight, grad, offset=offset, centred=False)
    found, gains, sq = rms_norm_backward(x, weight, grad, eps=EPS, offset=offset)
    assert found.dtype == dtype
    assert gains.dtype == (C if dtype == C else torch.float32)
    assert_near(found, back, tolerance(dtype))
    assert_near(gains, gain, 1e-5 if dtype != C else 1e-12)
    torch.testing.assert_close(sq, gains.double().square().sum(1), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, C])
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_layer_norm_equals_autograd_of_each_sample(
    shape: tuple[int, int, int], dtype: torch.dtype, fence: Fence
) -> None:
    x, weight, grad = operands(shape, dtype, fence)
    back, gain, shift = exact(x, weight, grad, offset=0.0, centred=True)
    found, gains, shifts, sq = layer_norm_backward(x, weight, grad, eps=EPS)
    assert_near(found, back, tolerance(dtype))
    assert_near(gains, gain, 1e-5)
    assert_near(shifts, shift, 1e-5)
    both = gains.double().square().sum(1) + shifts.double().square().sum(1)
    torch.testing.assert_close(sq, both, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("centred", [False, True])
def test_pytorch_gives_the_same(centred: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veilspan.kernels.operands.BLOCK_ELEMENTS", 500)  # several blocks
    x, weight, grad = operands((2, 40, 65), torch.bfloat16)
    back, gain, shift = exact(x, weight, grad, offset=1.0, centred=centred)
    found, sums = _backward(x, weight, grad, EPS, 1.0, centred)
    assert_near(found, back, tolerance(x.dtype))
    for one, right in zip(sums, (gain, shift), strict=False):
        assert_near(one, right, 1e-5)


def test_operands_may_have_any_strides_and_other_dtypes() -> None:
    x, weight, grad = operands((4, 12, 10), torch.float32)
    x, grad = x[::2].transpose(0, 1), grad.bfloat16()[::2, :, :].transpose(0, 1)
    right = rms_norm_backward(x.contiguous(), weight, grad.contiguous(), eps=EPS)
    for changed in ((x, weight, grad), (x.mT.contiguous().mT, weight, grad)):
        for one, two in zip(rms_norm_backward(*changed, eps=EPS), right, strict=True):
            assert torch.equal(one, two)


def test_parameters_are_taken_as_they_are() -> None:
    x, weight, grad = operands((2, 3, 5), torch.float32)
    for found in rms_norm_backward(x, torch.nn.Parameter(weight), grad, eps=EPS):
        assert not found.requires_grad


def test_the_norm_is_of_the_sum_over_tokens_not_of_its_terms() -> None:
    x = torch.tensor([[[1.0], [1.0]]])
    _, gain, sq = rms_norm_backward(x, torch.ones(1), torch.tensor([[[5.0], [-5.0]]]), eps=0.0)
    assert float(gain) == float(sq) == 0.0


def test_a_sample_does_not_depend_on_the_others() -> None:
    x, weight, grad = operands((3, 20, 33), torch.float32)
    whole = layer_norm_backward(x, weight, grad, eps=EPS)
    x[1:], grad[1:] = float("nan"), float("inf")
    spoiled = layer_norm_backward(x[:1], weight, grad[:1], eps=EPS)
    for one, two in zip(whole, spoiled, strict=True):
        assert torch.equal(one[:1], two)


def test_results_are_the_same_in_two_runs() -> None:
    arguments = operands((2, 40, 65), torch.bfloat16)
    for one, two in zip(
        layer_norm_backward(*arguments, eps=EPS),
        layer_norm_backward(*arguments, eps=EPS),
        strict=True,
    ):
        assert torch.equal(one, two)


def test_indices_reach_beyond_32_bits() -> None:
    strides = (2**31, 8, 1)
    x, grad = (sparse((2, 3, 5), strides, torch.float32) for _ in range(2))
    x += 2.0
    grad[1, 2, 4] = 3.0
    _, gain, sq = rms_norm_backward(x, torch.ones(5, device=x.device), grad, eps=0.0)
    assert float(gain[1, 4]) == pytest.approx(3.0)
    assert sq.tolist() == pytest.approx([0.0, 9.0])


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (2, 3, 0)])
def test_nothing_has_norm_zero(shape: tuple[int, int, int], device: torch.device) -> None:
    x = torch.zeros(shape, device=device)
    found, gain, shift, sq = layer_norm_backward(x, torch.ones(shape[2], device=device), x, eps=EPS)
    assert found.shape == shape
    assert gain.shape == shift.shape == (shape[0], shape[2])
    assert sq.tolist() == [0.0] * shape[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_BTD": torch.zeros(2, 3)}, r"x_BTD has shape \[2, 3\]; it must be \[B, T, D\]"),
        ({"weight_D": torch.zeros(5)}, r"weight_D has shape \[5\]; it must be \[4\]"),
        ({"grad_BTD": torch.zeros(2, 1, 4)}, r"grad_BTD has shape \[2, 1, 4\]"),
        ({"grad_BTD": torch.zeros(2, 3, 4, dtype=torch.int32)}, "grad_BTD is torch.int32"),
        ({"weight_D": torch.zeros(4, device="meta")}, "weight_D is on meta and x_BTD on cpu"),
        ({"eps": -1.0}, "eps is -1.0; it must be finite and not negative"),
        ({"offset": float("nan")}, "offset is nan; it must be finite"),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    arguments = {
        "x_BTD": torch.zeros(2, 3, 4),
        "weight_D": torch.ones(4),
        "grad_BTD": torch.zeros(2, 3, 4),
        "eps": EPS,
        **change,
    }
    x, weight, grad = (arguments.pop(name) for name in ("x_BTD", "weight_D", "grad_BTD"))
    with pytest.raises(ValueError, match=message):
        rms_norm_backward(x, weight, grad, **arguments)


def test_torch_compile_sees_the_op_without_graph_breaks() -> None:
    x, weight, grad = operands((2, 3, 5), torch.bfloat16)

    def backward(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        return layer_norm_backward(x, weight, grad, eps=EPS)

    compiled = torch.compile(backward, backend="eager", fullgraph=True)
    for one, two in zip(compiled(x, weight, grad), backward(x, weight, grad), strict=True):
        assert torch.equal(one, two)
    torch.library.opcheck(
        torch.ops.veilspan.affine_norm.default, (x, weight, grad, EPS, 1.0, False)
    )
