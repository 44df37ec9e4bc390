"""Biases: sums over tokens of each sample, and their norms."""

from __future__ import annotations

import pytest
import torch

from veilspan.kernels import bias_norm
from veilspan.kernels.ops.bias_norm import _token_sums
from veilspan.kernels.testing import Fence, random, sparse

C = torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, C])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 130), (1, 33, 3), (3, 17, 64), (2, 40, 65)])
def test_sums_and_norms_equal_fp64(
    shape: tuple[int, int, int], dtype: torch.dtype, fence: Fence
) -> None:
    grad = fence(random(*shape, dtype=dtype))
    sums, sq = bias_norm(grad)
    assert sums.dtype == (C if dtype == C else torch.float32)
    torch.testing.assert_close(sums.double(), grad.double().sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sq, sums.double().square().sum(1), rtol=1e-12, atol=0.0)


def test_pytorch_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veilspan.kernels.operands.BLOCK_ELEMENTS", 300)
    grad = random(2, 40, 65, dtype=torch.bfloat16)
    torch.testing.assert_close(_token_sums(grad), grad.double().sum(1), rtol=1e-12, atol=1e-12)


def test_the_norm_is_of_the_sum_over_tokens_not_of_its_terms(device: torch.device) -> None:
    grad = torch.tensor([[[5.0, 1.0], [-5.0, 1.0]]], device=device)
    assert bias_norm(grad)[1].tolist() == [4.0]


def test_gradients_may_have_any_strides() -> None:
    grad = random(12, 4, 10)[::3].transpose(0, 1)
    for changed in (grad, grad.mT.contiguous().mT):
        assert torch.equal(bias_norm(changed)[0], bias_norm(grad.contiguous())[0])


def test_results_are_the_same_in_two_runs() -> None:
    grad = random(2, 40, 65, dtype=torch.bfloat16)
    assert torch.equal(bias_norm(grad)[1], bias_norm(grad)[1])


def test_indices_reach_beyond_32_bits() -> None:
    grad = sparse((2, 3, 5), (2**31, 2**30, 1), torch.bfloat16)
    grad[1, 2, 4] = 3.0
    assert bias_norm(grad)[1].tolist() == [0.0, 9.0]


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (2, 3, 0)])
def test_nothing_has_norm_zero(shape: tuple[int, int, int], device: torch.device) -> None:
    sums, sq = bias_norm(torch.zeros(shape, device=device))
    assert sums.shape == (shape[0], shape[2])
    assert sq.tolist() == [0.0] * shape[0]


@pytest.mark.parametrize(
    ("grad", "message"),
    [
        (torch.zeros(2, 3), r"grad_BTO has shape \[2, 3\]; it must be \[B, T, O\]"),
        (torch.zeros(2, 3, 4, dtype=torch.int32), "grad_BTO is torch.int32"),
    ],
)
def test_bad_input_is_named(grad: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bias_norm(grad)


def test_torch_compile_sees_the_op_without_graph_breaks() -> None:
    grad = random(2, 3, 5)
    compiled = torch.compile(bias_norm, backend="eager", fullgraph=True)
    assert torch.equal(compiled(grad)[1], bias_norm(grad)[1])
    torch.library.opcheck(torch.ops.veilspan.bias_norm.default, (grad,))
