"""Squared norms of embedding gradients, where tokens repeat."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from veilspan.kernels import embedding_norm
from veilspan.kernels.ops.embedding_norm import run_sums
from veilspan.kernels.testing import DEVICE, Fence, random, sparse

C = torch.float64
SHAPES = [(1, 1, 1), (2, 1, 130), (1, 33, 3), (3, 17, 64), (2, 37, 65)]


def words(batch: int, length: int, vocabulary: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch + length)
    return torch.randint(vocabulary, (batch, length), generator=generator).to(DEVICE)


def exact(tokens: Tensor, grad: Tensor) -> Tensor:
    """Return the squared norm of each sample's whole table, from autograd's own rule."""
    table = torch.zeros(len(grad), int(tokens.max()) + 1, grad.shape[2], dtype=C, device=DEVICE)
    for b in range(len(grad)):
        table[b].index_add_(0, tokens[b].long(), grad[b].double())
    return table.square().sum((1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, C])
@pytest.mark.parametrize("shape", SHAPES)
def test_norms_equal_those_of_whole_tables(
    shape: tuple[int, int, int], dtype: torch.dtype, fence: Fence
) -> None:
    tokens, grad = fence(words(*shape[:2], 7)), fence(random(*shape, dtype=dtype))
    found = embedding_norm(tokens, grad)
    assert found.dtype == C
    torch.testing.assert_close(found, exact(tokens, grad), rtol=1e-12, atol=0.0)


# Chunks of the interpreter hold 4 places: runs that fill, cross, begin and end at their borders.
@pytest.mark.parametrize("lengths", [[64], [4, 4, 4], [3, 1, 9, 2, 4, 21], [1, 15, 1], [5] * 5])
def test_runs_of_any_length_are_whole(lengths: list[int]) -> None:
    tokens = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    shuffled = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(1))]
    tokens = torch.stack([tokens, tokens.flip(0), shuffled]).to(DEVICE)
    grad = random(*tokens.shape, 3)
    found = embedding_norm(tokens, grad)
    torch.testing.assert_close(found, exact(tokens, grad), rtol=1e-12, atol=0.0)


def test_pytorch_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veilspan.kernels.operands.BLOCK_ELEMENTS", 200)  # several blocks
    tokens, grad = words(2, 37, 7), random(2, 37, 65, dtype=torch.bfloat16)
    for b, (ids, order) in enumerate(zip(*torch.sort(tokens, stable=True), strict=True)):
        sums = run_sums(ids, order, grad[b : b + 1])
        total = sum(float(part.square().sum()) for _, _, part in sums)
        assert total == pytest.approx(float(exact(tokens, grad)[b]), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, C])
def test_padding_counts_for_nothing_even_where_it_is_not_finite(dtype: torch.dtype) -> None:
    tokens, grad = words(2, 20, 5), random(2, 20, 6, dtype=dtype)
    clean = grad.masked_fill((tokens == 3)[:, :, None], 0.0)
    grad = grad.masked_fill((tokens == 3)[:, :, None], float("nan"))
    found = embedding_norm(tokens, grad, padding_idx=3)
    torch.testing.assert_close(found, exact(tokens, clean), rtol=1e-12, atol=0.0)
    everywhere = torch.full_like(tokens, -100)
    assert embedding_norm(everywhere, grad, padding_idx=-100).tolist() == [0.0, 0.0]


def test_terms_that_cancel_leave_the_exact_norm() -> None:
    big = random(1, 30, 5) * 1e6
    rest = torch.full((1, 1, 5), 2.0**-10, device=DEVICE)
    grad = torch.cat([big, rest, -big], 1)
    found = embedding_norm(torch.zeros(1, 61, dtype=torch.int64, device=DEVICE), grad)
    assert float(found) == pytest.approx(5 * 2.0**-20, rel=1e-6)


def test_gradients_may_have_any_strides() -> None:
    tokens, grad = words(4, 9, 5), random(18, 4, 10)[::2].transpose(0, 1)
    right = embedding_norm(tokens, grad.contiguous())
    for changed in (grad, grad.mT.contiguous().mT):
        assert torch.equal(embedding_norm(tokens, changed), right)
    assert torch.equal(embedding_norm(tokens.int(), grad), right)


def test_results_are_the_same_in_two_runs() -> None:
    tokens, grad = words(2, 37, 7), random(2, 37, 65, dtype=torch.bfloat16)
    assert torch.equal(embedding_norm(tokens, grad), embedding_norm(tokens, grad))


def test_indices_reach_beyond_32_bits() -> None:
    grad = sparse((2, 3, 5), (2**31, 2**30, 1), torch.bfloat16)
    grad[1, 2, 4] = 3.0
    assert embedding_norm(words(2, 3, 2), grad).tolist() == [0.0, 9.0]


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (2, 3, 0)])
def test_nothing_has_norm_zero(shape: tuple[int, int, int], device: torch.device) -> None:
    found = embedding_norm(words(*shape[:2], 5), torch.zeros(shape, device=device))
    assert found.tolist() == [0.0] * shape[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens_BT": torch.zeros(2, 4, dtype=torch.int64)}, r"tokens_BT has shape \[2, 4\]"),
        ({"tokens_BT": torch.zeros(2, 3)}, "tokens_BT is torch.float32; it must be one of int64"),
        ({"grad_BTD": torch.zeros(2, 3)}, r"grad_BTD has shape \[2, 3\]; it must be \[B, T, D\]"),
        ({"grad_BTD": torch.zeros(2, 3, 4).int()}, "grad_BTD is torch.int32"),
        ({"grad_BTD": torch.zeros(2, 3, 4, device="meta")}, "grad_BTD is on meta"),
        (
            {"tokens_BT": torch.tensor([[0, -1, 2], [3, -5, -100]]), "padding_idx": -100},
            r"tokens_BT: 2 of 6 positions must be in \[0, …\) or -100",
        ),
    ],
)
def test_bad_input_is_named(change: dict, message: str, device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("on a GPU a device-side assertion reports tokens, which ends the process")
    arguments = {
        "tokens_BT": torch.zeros(2, 3, dtype=torch.int64),
        "grad_BTD": torch.zeros(2, 3, 4),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        embedding_norm(**arguments)


def test_torch_compile_sees_the_op_without_graph_breaks() -> None:
    tokens, grad = words(2, 5, 3), random(2, 5, 4)
    compiled = torch.compile(
        torch.ops.veilspan.embedding_norm.default, backend="eager", fullgraph=True
    )
    assert torch.equal(compiled(tokens, grad), embedding_norm(tokens, grad))
    torch.library.opcheck(torch.ops.veilspan.embedding_norm.default, (tokens, grad))
