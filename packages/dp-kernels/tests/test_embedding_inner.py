"""Tables that an embedding and a head share: the cross term of their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from veilspan.kernels import embedding_inner, embedding_norm, squared_norm
from veilspan.kernels.ops.embedding_inner import _gathered
from veilspan.kernels.testing import DEVICE, Fence, random, sparse

C = torch.float64
ROWS = 9
SHAPES = [(1, 1, 1), (2, 1, 130), (1, 33, 3), (3, 17, 64), (2, 37, 65)]


def words(batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch + length)
    return torch.randint(ROWS, (batch, length), generator=generator).to(DEVICE)


def through_embedding(tokens: Tensor, grad: Tensor) -> Tensor:
    table = torch.zeros(len(grad), ROWS, grad.shape[2], dtype=C, device=DEVICE)
    for b in range(len(grad)):
        table[b].index_add_(0, tokens[b], grad[b].double())
    return table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, C])
@pytest.mark.parametrize("shape", SHAPES)
def test_inner_products_equal_those_of_whole_tables(
    shape: tuple[int, int, int], dtype: torch.dtype, fence: Fence
) -> None:
    tokens, grad = fence(words(*shape[:2])), fence(random(*shape, dtype=dtype))
    table = fence(random(shape[0], ROWS, shape[2], dtype=dtype, seed=3))
    right = (through_embedding(tokens, grad) * table.double()).sum((1, 2))
    found = embedding_inner(tokens, grad, table)
    assert found.dtype == C
    torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(_gathered(tokens, grad, table), right, rtol=1e-11, atol=1e-11)


def test_a_shared_table_has_the_norm_of_the_sum() -> None:
    tokens, grad = words(2, 30), random(2, 30, 7)
    head = random(2, ROWS, 7, seed=4)
    both = (through_embedding(tokens, grad) + head.double()).square().sum((1, 2))
    found = embedding_norm(tokens, grad) + 2.0 * embedding_inner(tokens, grad, head)
    found += torch.stack([squared_norm([table]) for table in head])
    torch.testing.assert_close(found, both, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, C])
def test_padding_counts_for_nothing_even_where_it_is_not_finite(dtype: torch.dtype) -> None:
    tokens, grad = words(2, 20), random(2, 20, 6, dtype=dtype)
    head = random(2, ROWS, 6, dtype=dtype, seed=4)
    clean = grad.masked_fill((tokens == 3)[:, :, None], 0.0)
    right = embedding_inner(tokens, clean, head)
    grad = grad.masked_fill((tokens == 3)[:, :, None], float("nan"))
    head[:, 3] = float("inf")
    torch.testing.assert_close(embedding_inner(tokens, grad, head, padding_idx=3), right)


def test_operands_may_have_any_strides() -> None:
    tokens, grad = words(4, 9), random(18, 4, 10)[::2].transpose(0, 1)
    head = random(ROWS, 4, 10, seed=4).transpose(0, 1)
    right = embedding_inner(tokens, grad.contiguous(), head.contiguous())
    assert torch.equal(embedding_inner(tokens, grad, head), right)
    turned = head.mT.contiguous().mT
    assert torch.equal(embedding_inner(tokens.int(), grad.mT.contiguous().mT, turned), right)


def test_results_are_the_same_in_two_runs() -> None:
    arguments = words(2, 37), random(2, 37, 65), random(2, ROWS, 65, seed=4)
    assert torch.equal(embedding_inner(*arguments), embedding_inner(*arguments))


def test_indices_reach_beyond_32_bits() -> None:
    grad, head = (sparse((2, 3, 5), (2**31, 2**30, 1), torch.bfloat16) for _ in range(2))
    grad[1, 2, 4], head[1, 1, 4] = 3.0, 2.0
    tokens = torch.ones(2, 3, dtype=torch.int64, device=DEVICE)
    assert embedding_inner(tokens, grad, head).tolist() == [0.0, 6.0]


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (2, 3, 0)])
def test_nothing_has_product_zero(shape: tuple[int, int, int], device: torch.device) -> None:
    head = torch.zeros(shape[0], ROWS, shape[2], device=device)
    found = embedding_inner(words(*shape[:2]), torch.zeros(shape, device=device), head)
    assert found.tolist() == [0.0] * shape[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table_BVD": torch.zeros(2, 9, 5)}, r"table_BVD has shape \[2, 9, 5\]; it must be"),
        ({"table_BVD": torch.zeros(2, 9, 4).int()}, "table_BVD is torch.int32"),
        ({"table_BVD": torch.zeros(2, 9, 4, device="meta")}, "table_BVD is on meta"),
        ({"tokens_BT": torch.tensor([[0, 9, 2], [8, 12, 1]])}, "tokens_BT: 2 of 6 positions"),
    ],
)
def test_bad_input_is_named(change: dict, message: str, device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("on a GPU a device-side assertion reports tokens, which ends the process")
    arguments = {
        "tokens_BT": torch.zeros(2, 3, dtype=torch.int64),
        "grad_BTD": torch.zeros(2, 3, 4),
        "table_BVD": torch.zeros(2, ROWS, 4),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        embedding_inner(**arguments)


def test_torch_compile_sees_the_op_without_graph_breaks() -> None:
    op = torch.ops.veilspan.embedding_inner.default
    arguments = words(2, 5), random(2, 5, 4), random(2, ROWS, 4, seed=4)
    compiled = torch.compile(op, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*arguments), op(*arguments))
    torch.library.opcheck(op, arguments)
