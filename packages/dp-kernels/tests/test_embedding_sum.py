"""Clipped sums of embedding gradients over the batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from veilspan.kernels import embedding_sum_
from veilspan.kernels.testing import DEVICE, Fence, random, sparse

C = torch.float64
ROWS = 9
SHAPES = [(1, 1, 1), (2, 1, 130), (1, 33, 3), (3, 17, 64), (2, 37, 65)]


def words(batch: int, length: int, vocabulary: int = ROWS) -> Tensor:
    generator = torch.Generator().manual_seed(batch + length)
    return torch.randint(vocabulary, (batch, length), generator=generator).to(DEVICE)


def exact(total: Tensor, tokens: Tensor, grad: Tensor, factor: Tensor) -> Tensor:
    terms = grad.double() * factor.double()[:, None, None]
    return total.double().index_add(0, tokens.flatten(), terms.flatten(0, 1))


@pytest.mark.parametrize("total_dtype", [torch.float32, C])  # the kernel, and PyTorch
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, C])
@pytest.mark.parametrize("shape", SHAPES)
def test_totals_grow_by_the_weighted_tables(
    shape: tuple[int, int, int], dtype: torch.dtype, total_dtype: torch.dtype, fence: Fence
) -> None:
    tokens, grad = fence(words(*shape[:2])), fence(random(*shape, dtype=dtype))
    factor = fence(torch.rand(shape[0], generator=torch.Generator().manual_seed(1)).to(DEVICE))
    total = fence(random(ROWS, shape[2], dtype=total_dtype, seed=5))
    right = exact(total, tokens, grad, factor)
    embedding_sum_(total, tokens, grad, factor)
    tolerance = 2.0**-22 if total_dtype == torch.float32 else 1e-13
    torch.testing.assert_close(total.double(), right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("lengths", [[64], [4, 4, 4], [3, 1, 9, 2, 4, 21], [1, 15, 1]])
def test_runs_of_any_length_are_added_once(lengths: list[int]) -> None:
    tokens = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    tokens = torch.stack([tokens, tokens.flip(0)]).to(DEVICE)
    grad, factor = random(*tokens.shape, 3), torch.tensor([1.0, 0.25], device=DEVICE)
    total = torch.zeros(len(lengths), 3, device=DEVICE)
    right = exact(total, tokens, grad, factor)
    embedding_sum_(total, tokens, grad, factor)
    torch.testing.assert_close(total.double(), right, rtol=2.0**-23, atol=1e-30)


@pytest.mark.parametrize("total_dtype", [torch.float32, C])
def test_a_zero_factor_and_padding_drop_what_is_not_finite(total_dtype: torch.dtype) -> None:
    tokens, grad = words(3, 12), random(3, 12, 5)
    factor = torch.tensor([0.5, 0.0, 2.0], device=DEVICE)
    clean = grad.masked_fill((tokens == 3)[:, :, None], 0.0)
    grad = grad.masked_fill((tokens == 3)[:, :, None], float("inf"))
    grad[1] = float("nan")
    clean[1] = 0.0
    total = random(ROWS, 5, dtype=total_dtype)
    right = exact(total, tokens, clean, factor)
    embedding_sum_(total, tokens, grad, factor, padding_idx=3)
    torch.testing.assert_close(total.double(), right, rtol=1e-6, atol=1e-6)


def test_rows_without_tokens_are_not_touched() -> None:
    total = torch.full((ROWS, 4), float("nan"), device=DEVICE)
    total[2] = 0.0
    tokens = torch.full((1, 7), 2, device=DEVICE)
    embedding_sum_(total, tokens, random(1, 7, 4), torch.ones(1, device=DEVICE))
    assert bool(total[2].isfinite().all())
    assert bool(total[3:].isnan().all())


def test_results_are_the_same_in_two_runs() -> None:
    tokens, grad = words(2, 37), random(2, 37, 65, dtype=torch.bfloat16)
    factor = torch.tensor([0.3, 0.7], dtype=C, device=DEVICE)
    totals = torch.zeros(2, ROWS, 65, device=DEVICE)
    for total in totals:
        embedding_sum_(total, tokens, grad, factor)
    assert torch.equal(totals[0], totals[1])


def test_indices_reach_beyond_32_bits() -> None:
    grad = sparse((2, 3, 5), (2**31, 2**30, 1), torch.bfloat16)
    grad[1, 2, 4] = 3.0
    total = torch.zeros(ROWS, 5, device=DEVICE)
    tokens = words(2, 3)
    embedding_sum_(total, tokens, grad, torch.ones(2, device=DEVICE))
    assert float(total[tokens[1, 2], 4]) == float(total.sum()) == 3.0


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (2, 3, 0)])
def test_nothing_adds_nothing(shape: tuple[int, int, int], device: torch.device) -> None:
    total, factor = random(ROWS, shape[2]), torch.ones(shape[0], device=device)
    before = total.clone()
    embedding_sum_(total, words(*shape[:2]), torch.zeros(shape, device=device), factor)
    assert torch.equal(total, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"total_VD": torch.zeros(9, 5)}, r"total_VD has shape \[9, 5\]; it must be \[V, 4\]"),
        ({"total_VD": torch.zeros(4, 9).mT}, "total_VD is not contiguous"),
        ({"total_VD": torch.zeros(9, 4).bfloat16()}, "total_VD is torch.bfloat16"),
        ({"factor_B": torch.zeros(3)}, r"factor_B has shape \[3\]; it must be \[2\]"),
        ({"factor_B": torch.tensor([1.0, float("nan")])}, "factor_B must be finite"),
        ({"factor_B": torch.zeros(2, device="meta")}, "factor_B is on meta"),
        (
            {"tokens_BT": torch.tensor([[0, 9, 2], [8, 12, 1]])},
            r"tokens_BT: 2 of 6 positions must be in \[0, 9\)",
        ),
    ],
)
def test_bad_input_is_named(change: dict, message: str, device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("on a GPU a device-side assertion reports it, which ends the process")
    arguments = {
        "total_VD": torch.zeros(ROWS, 4),
        "tokens_BT": torch.zeros(2, 3, dtype=torch.int64),
        "grad_BTD": torch.zeros(2, 3, 4),
        "factor_B": torch.ones(2),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        embedding_sum_(**arguments)


def test_torch_compile_sees_the_op_without_graph_breaks() -> None:
    op = torch.ops.veilspan.embedding_sum_.default
    tokens, grad, factor = words(2, 5), random(2, 5, 4), torch.ones(2, device=DEVICE)

    def summed(tokens: Tensor, grad: Tensor, factor: Tensor) -> Tensor:
        total = grad.new_zeros((ROWS, 4))
        op(total, tokens, grad, factor)
        return total

    compiled = torch.compile(summed, backend="eager", fullgraph=True)
    assert torch.equal(compiled(tokens, grad, factor), summed(tokens, grad, factor))
    torch.library.opcheck(op, (torch.zeros(ROWS, 4, device=DEVICE), tokens, grad, factor))
