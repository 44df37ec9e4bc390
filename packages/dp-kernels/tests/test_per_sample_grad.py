"""Per-sample weight gradients with the squared norms of the bits that are stored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from veilspan.kernels import direct_norm, per_sample_grad
from veilspan.kernels.ops import per_sample_grad as module
from veilspan.kernels.testing import Fence, random, sparse

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [(1, 1, 1, 1), (2, 37, 45, 51), (3, 5, 130, 33), (1, 70, 70, 65), (4, 1, 3, 128)]
ULP = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 1e-5, torch.float64: 1e-5}


def operands(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, fence: Fence
) -> tuple[Tensor, Tensor]:
    samples, tokens, inputs, outputs = sizes
    act_BTI = fence(random(samples, tokens, inputs, dtype=dtype, seed=1))
    return act_BTI, fence(random(samples, tokens, outputs, dtype=dtype, seed=2))


def exact(act_BTI: Tensor, grad_BTO: Tensor) -> Tensor:
    return torch.bmm(grad_BTO.double().mT, act_BTI.double())


def assert_right(found: Tensor, sq_norm_B: Tensor, right_BOI: Tensor) -> None:
    tolerance = ULP[found.dtype]
    torch.testing.assert_close(found.double(), right_BOI, rtol=tolerance, atol=1e-5)
    assert sq_norm_B.dtype == torch.float64
    stored = found.double().square().sum((1, 2))
    torch.testing.assert_close(sq_norm_B, stored, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sizes", SIZES)
def test_gradients_equal_fp64_and_norms_the_stored_bits(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, fence: Fence
) -> None:
    act_BTI, grad_BTO = operands(sizes, dtype, fence)
    out = fence(random(sizes[0], sizes[3], sizes[2], dtype=dtype) * float("nan"))
    found, sq_norm_B = per_sample_grad(act_BTI, grad_BTO, out=out)
    assert found is out
    assert_right(found, sq_norm_B, exact(act_BTI, grad_BTO))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("out_dtype", FLOATS)
def test_gradients_are_stored_in_the_dtype_that_is_asked_for(
    dtype: torch.dtype, out_dtype: torch.dtype, fence: Fence
) -> None:
    act_BTI, grad_BTO = operands((2, 9, 20, 34), dtype, fence)
    found, sq_norm_B = per_sample_grad(act_BTI, grad_BTO, out_dtype=out_dtype)
    assert found.dtype == out_dtype
    assert_right(found, sq_norm_B, exact(act_BTI, grad_BTO))


def test_the_dtype_of_the_gradient_is_the_default() -> None:
    found, _ = per_sample_grad(random(1, 2, 3), random(1, 2, 4, dtype=torch.bfloat16))
    assert found.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("scratch", [1, 300, 1 << 22])
def test_blocks_in_pytorch_equal_fp64(
    scratch: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    fence: Fence,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("veilspan.kernels.tiles.SCRATCH", scratch)
    act_BTI, grad_BTO = operands((3, 21, 17, 6), dtype, fence)
    out = fence(random(3, 6, 17, dtype=out_dtype) * float("nan"))
    sq_norm_B = module._in_blocks(act_BTI, grad_BTO, out)
    assert_right(out, sq_norm_B, exact(act_BTI, grad_BTO))


def test_fp32_gradients_have_the_direct_norm_of_their_operands(fence: Fence) -> None:
    act_BTI, grad_BTO = operands((2, 37, 45, 51), torch.bfloat16, fence)
    _, sq_norm_B = per_sample_grad(act_BTI, grad_BTO, out_dtype=torch.float32)
    torch.testing.assert_close(sq_norm_B, direct_norm(act_BTI, grad_BTO), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("call", ["kernel", "blocks"])
def test_samples_may_lie_apart(call: str, device: torch.device) -> None:
    act_BTI, grad_BTO = random(3, 4, 7), random(3, 4, 5)
    flat = torch.zeros(3, 100, device=device)
    out = flat[:, 11:46].unflatten(1, (5, 7))
    if call == "kernel":
        _, sq_norm_B = per_sample_grad(act_BTI, grad_BTO, out=out)
    else:
        sq_norm_B = module._in_blocks(act_BTI, grad_BTO, out)
    assert_right(out, sq_norm_B, exact(act_BTI, grad_BTO))
    assert not flat[:, :11].any()
    assert not flat[:, 46:].any()


def test_operands_may_have_any_strides() -> None:
    act_BTI = random(11, 3, 2 * 20).transpose(0, 1)[:, :, ::2]
    grad_BTO = random(3, 6, 22).mT[:, ::2]
    assert_right(*per_sample_grad(act_BTI, grad_BTO), exact(act_BTI, grad_BTO))


@pytest.mark.parametrize("sizes", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_nothing_has_gradient_zero(
    out_dtype: torch.dtype, sizes: tuple[int, int, int, int], fence: Fence
) -> None:
    samples, _, inputs, outputs = sizes
    act_BTI, grad_BTO = operands(sizes, torch.float32, fence)
    found, sq_norm_B = per_sample_grad(act_BTI, grad_BTO, out_dtype=out_dtype)
    other = torch.full_like(found, float("nan"))
    sq_other_B = module._in_blocks(act_BTI, grad_BTO, other)
    assert found.shape == (samples, outputs, inputs)
    assert sq_norm_B.tolist() == sq_other_B.tolist() == [0.0] * samples
    assert not found.any()
    assert not other.any()


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # numpy, in the interpreter
def test_gradients_beyond_the_range_have_no_finite_norm(fence: Fence) -> None:
    act_BTI, grad_BTO = operands((2, 3, 4, 5), torch.float32, fence)
    act_BTI[1] *= 1e6
    _, sq_norm_B = per_sample_grad(act_BTI, grad_BTO, out_dtype=torch.float16)
    assert sq_norm_B.isfinite().tolist() == [True, False]


def test_results_are_the_same_in_two_runs(fence: Fence) -> None:
    pair = operands((2, 40, 70, 40), torch.bfloat16, fence)
    for first, second in zip(per_sample_grad(*pair), per_sample_grad(*pair), strict=True):
        assert torch.equal(first, second)


def test_indices_reach_beyond_32_bits() -> None:
    act_BTI, grad_BTO = random(2, 3, 4), random(2, 3, 5)
    out = sparse((2, 5, 4), (2**31 + 6, 4, 1), torch.float32)
    assert_right(*per_sample_grad(act_BTI, grad_BTO, out=out), exact(act_BTI, grad_BTO))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_BTI": torch.ones(4, 5)}, r"act_BTI has shape \[4, 5\]; it must be \[B, T, I\]"),
        ({"grad_BTO": torch.ones(2, 4, 5)}, r"grad_BTO has shape \[2, 4, 5\]; .* \[2, 3, O\]"),
        ({"out": torch.ones(2, 4, 5)}, r"out has shape \[2, 4, 5\]; it must be \[2, 5, 4\]"),
        ({"out": torch.ones(2, 4, 5).mT}, "out does not hold one contiguous matrix"),
        ({"out": torch.ones(1, 5, 4).expand(2, 5, 4)}, "out does not hold one contiguous matrix"),
        ({"out": torch.ones(2, 5, 4, dtype=torch.int32)}, "out is torch.int32"),
        ({"out": torch.ones(2, 5, 4, device="meta")}, "out is on meta"),
        ({"out": torch.ones(2, 5, 4), "out_dtype": torch.bfloat16}, "out is torch.float32 and"),
        ({"out_dtype": torch.int32}, "out_dtype is torch.int32; it must be one of"),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    arguments = {"act_BTI": torch.ones(2, 3, 4), "grad_BTO": torch.ones(2, 3, 5), **change}
    with pytest.raises(ValueError, match=message):
        per_sample_grad(**arguments)


def test_torch_compile_sees_the_op_without_graph_breaks() -> None:
    act_BTI, grad_BTO = random(2, 3, 4), random(2, 3, 5)

    def norms(out: Tensor) -> Tensor:
        return torch.ops.veilspan.per_sample_grad(act_BTI, grad_BTO, out).sqrt() + out.sum()

    compiled = torch.compile(norms, backend="eager", fullgraph=True)
    out = random(2, 5, 4)
    assert torch.equal(compiled(out), norms(out))
    torch.library.opcheck(
        torch.ops.veilspan.per_sample_grad.default, (act_BTI, grad_BTO, random(2, 5, 4))
    )
