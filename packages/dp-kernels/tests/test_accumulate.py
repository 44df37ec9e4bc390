"""Squared norms of many tensors, and totals that grow by clipped gradients."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from veilspan.kernels import accumulate_, squared_norm
from veilspan.kernels.testing import Fence, random, sparse

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(1,), (2, 3), (0,), (130,), (7, 65), (257,), (1, 1, 129)]
C = torch.float64


def gradients(dtype: torch.dtype, fence: Fence) -> list[Tensor]:
    return [fence(random(*shape, dtype=dtype, seed=i)) for i, shape in enumerate(SHAPES)]


def exact_square(tensors: Sequence[Tensor]) -> float:
    return float(sum(tensor.double().square().sum() for tensor in tensors))


@pytest.mark.parametrize("dtype", FLOATS)
def test_squared_norm_equals_fp64(dtype: torch.dtype, fence: Fence) -> None:
    tensors = gradients(dtype, fence)
    found = squared_norm(tensors)
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(exact_square(tensors), rel=1e-12)


def test_tensors_of_several_dtypes_have_one_norm(fence: Fence) -> None:
    tensors = [t for dtype in FLOATS for t in gradients(dtype, fence)]
    assert float(squared_norm(tensors)) == pytest.approx(exact_square(tensors), rel=1e-12)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("factor", [1.0, 0.37, 0.0])
def test_fp32_totals_get_the_rounded_product(
    dtype: torch.dtype, factor: float, fence: Fence, device: torch.device
) -> None:
    parts = gradients(dtype, fence)
    scale = torch.tensor(factor, dtype=C, device=device)
    totals = [fence(random(*part.shape, seed=9)) for part in parts]
    expected = [
        total + part.float() * scale.float() for total, part in zip(totals, parts, strict=True)
    ]
    added = accumulate_(totals, parts, scale)
    for total, right in zip(totals, expected, strict=True):
        torch.testing.assert_close(total, right, rtol=0.0, atol=0.0)
    bits = exact_square([part.float() * scale.float() for part in parts])
    assert float(added) == pytest.approx(bits, rel=1e-12)


@pytest.mark.parametrize("dtype", FLOATS)
def test_totals_may_be_fp64_and_of_several_dtypes(
    dtype: torch.dtype, fence: Fence, device: torch.device
) -> None:
    parts, scale = gradients(dtype, fence), torch.tensor(0.37, dtype=C, device=device)
    wide = [torch.float64, torch.float32]
    totals = [
        fence(torch.zeros(part.shape, dtype=wide[i % 2], device=device))
        for i, part in enumerate(parts)
    ]
    added = accumulate_(totals, parts, scale)
    for total, part in zip(totals, parts, strict=True):
        torch.testing.assert_close(total, part.to(total.dtype) * scale.to(total.dtype))
    assert float(added) == pytest.approx(exact_square(parts) * 0.37**2, rel=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
def test_integer_totals_get_the_truncated_product(
    dtype: torch.dtype, fence: Fence, device: torch.device
) -> None:
    grain, scale = 2.0**-40, torch.tensor(0.37, dtype=C, device=device)
    parts = gradients(dtype, fence)
    totals = [fence(torch.full(part.shape, 5, dtype=torch.int64, device=device)) for part in parts]
    added = accumulate_(totals, parts, scale, grain=grain)
    whole = [(part.double() * (scale / grain)).to(torch.int64) for part in parts]
    for total, right in zip(totals, whole, strict=True):
        assert torch.equal(total, right + 5)
    assert float(added) == pytest.approx(exact_square(whole) * grain**2, rel=1e-12)


@pytest.mark.parametrize("grain", [None, 2.0**-40])
def test_what_is_added_never_exceeds_the_clip_norm(
    grain: float | None, device: torch.device
) -> None:
    dtype = torch.float32 if grain is None else torch.int64
    for seed in range(5):
        parts = [random(300, dtype=torch.bfloat16, seed=seed) * 10.0**seed]
        norm = squared_norm(parts).sqrt()
        factor = torch.clamp(0.5 * (1 - 2.0**-20) / norm, max=1.0)
        totals = [torch.zeros(300, dtype=dtype, device=device)]
        assert float(accumulate_(totals, parts, factor, grain=grain)) <= 0.25


@pytest.mark.parametrize("grain", [None, 2.0**-40])
def test_a_zero_factor_drops_a_gradient_that_is_not_finite(
    grain: float | None, device: torch.device
) -> None:
    dtype = torch.float32 if grain is None else torch.int64
    total = torch.full((5,), 3, dtype=dtype, device=device)
    bad = torch.tensor([float("nan"), float("inf"), 1.0, -float("inf"), 0.0], device=device)
    added = accumulate_([total], [bad], torch.tensor(0.0, device=device), grain=grain)
    assert float(added) == 0.0
    assert total.tolist() == [3] * 5


def test_a_factor_without_a_normal_number_in_fp32_adds_nothing(device: torch.device) -> None:
    """Rounded up to 2⁻¹⁴⁹ it would double what it multiplies."""
    total, factor = torch.zeros(1, device=device), torch.tensor(8e-46, dtype=C, device=device)
    part = torch.full((1,), 3e38, device=device)
    assert float(accumulate_([total], [part], factor)) == float(total) == 0.0
    whole = torch.zeros(1, dtype=torch.int64, device=device)
    accumulate_([whole], [part], factor, grain=1e-12)
    assert int(whole) == int(3e38 * 8e-46 / 1e-12)


def test_gradients_may_have_any_strides(device: torch.device) -> None:
    part = random(12, 10)[::2].mT
    total = torch.zeros(10, 6, device=device)
    accumulate_([total], [part], torch.tensor(2.0, device=device))
    assert torch.equal(total, 2.0 * part)
    assert float(squared_norm([part])) == pytest.approx(exact_square([part]))


def test_results_are_the_same_in_two_runs(device: torch.device) -> None:
    parts = [random(5000, dtype=torch.bfloat16), random(77)]
    assert torch.equal(squared_norm(parts), squared_norm(parts))


def test_indices_reach_beyond_32_bits(device: torch.device) -> None:
    length = 2**31 + 70
    if device.type == "cpu":
        pytest.skip("the interpreter would take days for so many programs; `nox -s gpu` runs it")
    part = sparse([length], [1], torch.bfloat16)
    part[-1] = 3.0
    assert float(squared_norm([part])) == 9.0


def test_no_tensors_have_norm_zero(device: torch.device) -> None:
    assert float(squared_norm([])) == 0.0
    assert float(accumulate_([], [], torch.tensor(1.0, device=device))) == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factor": torch.tensor(float("nan"))}, "factor must be finite"),
        ({"factor": torch.tensor([1.0])}, r"factor has shape \[1\]; it must be \[\]"),
        ({"factor": torch.tensor(1)}, "factor is torch.int64; it must be one of float64, float32"),
        ({"totals": [torch.zeros(4, dtype=torch.bfloat16)]}, r"totals\[0\] is torch.bfloat16"),
        ({"totals": [torch.zeros(5)]}, r"gradients\[0\] has shape \[4\]; it must be \[5\]"),
        ({"totals": [torch.zeros(8)[::2]]}, r"totals\[0\] is not contiguous"),
        ({"totals": []}, "totals holds 0 tensors and gradients 1"),
        ({"gradients": [torch.zeros(4, device="meta")]}, r"gradients\[0\] is on meta"),
        ({"gradients": [torch.zeros(4, dtype=torch.int32)]}, r"gradients\[0\] is torch.int32"),
        ({"grain": 0.0}, "grain is 0.0; it must be finite and above 0"),
        ({"grain": 0.5}, r"totals\[0\] is torch.float32; it must be one of int64"),
    ],
)
def test_bad_input_is_named(change: dict, message: str, device: torch.device) -> None:
    if device.type != "cpu" and "must be finite" in message:
        pytest.skip("on a GPU a device-side assertion reports it, which ends the process")
    arguments = {
        "totals": [torch.zeros(4)],
        "gradients": [torch.ones(4)],
        "factor": torch.tensor(1.0),
        **change,
    }
    totals, parts, factor = (arguments.pop(k) for k in ("totals", "gradients", "factor"))
    with pytest.raises(ValueError, match=message):
        accumulate_(totals, parts, factor, **arguments)


def test_torch_compile_sees_the_ops_without_graph_breaks(device: torch.device) -> None:
    def clipped(total: Tensor, part: Tensor) -> Tensor:
        factor = torch.clamp(1.0 / squared_norm([part]).sqrt(), max=1.0)
        return torch.ops.veilspan.accumulate_([total], [part], factor, 0.0)

    total, part = torch.zeros(9, device=device), random(9)
    compiled = torch.compile(clipped, backend="eager", fullgraph=True)
    assert float(compiled(total, part)) == pytest.approx(float(min(1.0, squared_norm([part]))))
    torch.library.opcheck(torch.ops.veilspan.squared_norm.default, ([part],))
    torch.library.opcheck(
        torch.ops.veilspan.accumulate_.default,
        ([total], [part], torch.tensor(1.0, device=device), 0.0),
    )


@pytest.mark.parametrize(
    "op", ["accumulate_", "add_noise_", "fused_head", "layerwise_clip_", "squared_norm"]
)
def test_ops_that_copy_from_the_host_stay_out_of_cuda_graphs(op: str) -> None:
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.veilspan, op).default.tags
