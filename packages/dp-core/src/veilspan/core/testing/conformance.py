"""Suites that whoever writes a layer rule, a kernel or a strategy runs against the oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from veilspan.core.groups import Clipping, Flat
from veilspan.core.norms import BlockedKernel
from veilspan.core.protocols import NormKernel
from veilspan.core.rules import find_rule
from veilspan.core.step import PrivateStep
from veilspan.core.testing.oracle import (
    Batch,
    ComputeLosses,
    Oracle,
    batch_size,
    flat,
    take,
)

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Relative error that a correct implementation stays within, by dtype of the model."""


class _Capture:
    """A noise source that adds nothing and keeps what it is handed: the sum before noise."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add_(self, tensor: Tensor, *, stddev: float, step: int, name: str, offset: int) -> None:
        self.sums[name] = tensor.clone()


def clipped_sum(
    model: nn.Module,
    compute_losses: ComputeLosses,
    batch: Batch,
    *,
    clipping: Clipping,
    size: int,
    **options: object,
) -> dict[str, Tensor]:
    """Return the pre-noise sum, fp32 or fp64, that a `PrivateStep` forms of `batch`, by name.

    Args:
        model: The model; left as it was.
        compute_losses: Losses `[B]` of a batch.
        batch: The records.
        clipping: Groups and rule.
        size: Records per micro-batch.
        **options: Further options of `PrivateStep`, such as `backward` and `norms`.
    """
    capture = _Capture()
    step = PrivateStep(
        model,
        clipping=clipping,
        noise_multiplier=1.0,
        expected_batch_size=1.0,
        noise=capture,
        **options,  # pyright: ignore[reportArgumentType]
    )
    try:
        with step:
            for start in range(0, batch_size(batch), size):
                step.backward(compute_losses(model, take(batch, start, start + size)))
    finally:
        step.detach()
        for parameter in model.parameters():
            parameter.grad = None
    return {name: capture.sums[name] for name in step.parameters}


def assert_step_matches_oracle(
    model: nn.Module,
    compute_losses: ComputeLosses,
    batch: Batch,
    *,
    clipping: Clipping,
    size: int,
    tolerance: float | None = None,
    **options: object,
) -> None:
    """Assert that a private step's clipped sum equals the per-sample loop's.

    Args:
        model: The model; left as it was.
        compute_losses: Losses `[B]` of a batch.
        batch: The records.
        clipping: Groups and rule.
        size: Records per micro-batch.
        tolerance: Relative error allowed; by default that of the model's dtype.
        **options: Further options of `PrivateStep`, such as `backward` and `norms`.

    Raises:
        AssertionError: If the relative L2 error of the sum exceeds the tolerance.
    """
    expected = Oracle.of(model, compute_losses, batch, clipping)
    dtype = next(model.parameters()).dtype
    limit = TOLERANCE[dtype] if tolerance is None else tolerance
    got = clipped_sum(model, compute_losses, batch, clipping=clipping, size=size, **options)
    assert_close(got, expected.clipped_sum, limit)


def assert_close(
    got: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float
) -> None:
    """Assert that two sets of gradients agree within a relative L2 error.

    Raises:
        AssertionError: Naming the parameter that differs most.
    """
    assert got.keys() == expected.keys(), f"{got.keys() ^ expected.keys()} on one side only"
    scale = flat(expected).norm().item() or 1.0
    error = (flat(got) - flat(expected)).norm().item() / scale
    worst = max(expected, key=lambda n: (got[n].double() - expected[n].double()).norm().item())
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e}; worst at '{worst}'"


def assert_rule_matches(
    module: nn.Module | Callable[[], nn.Module],
    inputs: Tensor | Sequence[Sequence[int]],
    *,
    kernel: NormKernel | None = None,
) -> None:
    """Assert that the rule found for a module gives exact gradients, norms and weighted sums.

    Args:
        module: A module with trainable parameters, or what builds it; compared in fp64.
        inputs: Its input, dimension 0 the records; or shapes, each tried with random numbers.
        kernel: Arithmetic of linear maps.

    Raises:
        AssertionError: If no rule is found, or any of its answers is off by more than 1e-10.

    Examples:
        >>> assert_rule_matches(nn.Linear(3, 2), [(2, 3), (4, 7, 3)])
    """
    module = (copy.deepcopy(module) if isinstance(module, nn.Module) else module()).double()
    kernel = kernel or BlockedKernel()
    assert find_rule("module", module, kernel) is not None, f"no rule matches {module}"
    if isinstance(inputs, Tensor):
        _assert_rule_on(module, inputs, kernel)
        return
    generator = torch.Generator().manual_seed(0)
    for shape in inputs:
        values = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
        _assert_rule_on(module, values, kernel)


def _assert_rule_on(module: nn.Module, inputs: Tensor, kernel: NormKernel) -> None:
    def losses(model: nn.Module, part: Batch) -> Tensor:
        output = model(part["inputs"])
        weights = torch.linspace(-1, 1, output[0].numel(), dtype=output.dtype)
        return (output.flatten(1) * weights).sum(1).sin()

    tapped = [
        ("per_sample", "auto"),
        ("two_pass", "direct"),
        ("two_pass", "gram"),
        ("bookkeeping", "auto"),
    ]
    for backward, norms in tapped:
        for clip_norm in (1e-2, 1e2):
            assert_step_matches_oracle(
                module,
                losses,
                {"inputs": inputs},
                clipping=Flat(clip_norm=clip_norm),
                size=len(inputs),
                backward=backward,
                norms=norms,
                kernel=kernel,
            )


def assert_kernel_conforms(
    kernel: NormKernel,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> None:
    """Assert that a kernel's answers equal the obvious ones over odd shapes.

    Args:
        kernel: The kernel.
        dtype: Dtype of the operands.
        device: Where they are; the same numbers on every device.

    Raises:
        AssertionError: If an answer is off, or a squared norm is below the true one.
    """
    limit = 1e-10 if dtype == torch.float64 else 1e-4
    generator = torch.Generator().manual_seed(0)
    for batch, length, inputs, outputs in (
        (1, 1, 1, 1),
        (2, 37, 5, 7),
        (3, 65, 130, 33),
        (0, 4, 3, 2),
    ):
        act = torch.randn((batch, length, inputs), generator=generator).to(device, dtype)
        grad = torch.randn((batch, length, outputs), generator=generator).to(device, dtype)
        factor_B = torch.rand(batch, generator=generator, dtype=torch.float64).to(device)
        exact = torch.einsum("bto,bti->boi", grad.double(), act.double())
        sq_B = exact.flatten(1).square().sum(1)
        size_B = (act.double().norm(dim=2) * grad.double().norm(dim=2)).sum(1)
        for name in ("sq_norm_direct", "sq_norm_gram"):
            found, size = (value.double() for value in getattr(kernel, name)(act, grad))
            assert ((size - size_B).abs() <= limit * size_B).all(), f"{name} is off: {size}"
            assert ((found - sq_B).abs() <= limit * sq_B).all(), f"{name} is off: {found} {sq_B}"
            assert (found >= sq_B * (1 - 2.0**-18)).all(), f"{name} is below the true norm"
        _assert_outer_products(kernel, act, grad, factor_B, limit)
        found = kernel.per_sample_grad(act, grad).double()
        grain = limit if dtype in (torch.float64, torch.float32) else 1e-2
        assert (found - exact).norm() <= grain * exact.norm(), "per_sample_grad is off"
        gain = torch.randn(inputs, generator=generator).to(device, dtype)
        upper = torch.randn((batch, length, inputs), generator=generator).to(device, dtype)
        for centred in (False, True):
            _assert_normalisation(kernel, act, gain, upper, centred, grain)
        _assert_lookups(kernel, grad, factor_B, limit)


def _assert_outer_products(
    kernel: NormKernel, act: Tensor, grad: Tensor, factor_B: Tensor, limit: float
) -> None:
    """Compare with the gradient of each sample; a sample that is not finite is dropped."""
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    exact = torch.einsum("bto,bti->boi", grad.double(), act.double())
    norm_B = exact.flatten(1).norm(dim=1)
    norm = float((factor_B * norm_B).max()) if len(act) else 1.0
    summed = torch.einsum("b,boi->oi", factor_B, exact)
    if len(act) > 1:
        grad, factor_B = grad.clone(), factor_B.clone()
        summed -= factor_B[1] * exact[1]
        grad[1], factor_B[1] = float("nan"), 0.0
    size_B = (act.double().norm(dim=2) * grad.double().norm(dim=2)).sum(1)
    for size in (None, size_B):
        total = torch.ones(grad.shape[2], act.shape[2], dtype=wide, device=grad.device)
        kernel.add_outer_products_(total, act, grad, factor_B, clip_norm=norm, size_B=size)
        off = (total.double() - 1.0 - summed).norm()
        assert off <= limit * (1.0 + summed.norm()), f"add_outer_products_ is off: {off}"


def _assert_lookups(kernel: NormKernel, grad: Tensor, factor_B: Tensor, limit: float) -> None:
    """Compare with the table of each sample; a sample that is not finite is dropped."""
    batch, length, width = grad.shape
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, (batch, length), generator=generator).to(grad.device)
    hot = torch.nn.functional.one_hot(ids, 5).double()
    tables = torch.einsum("btv,btd->bvd", hot, grad.double())
    sq_B = tables.flatten(1).square().sum(1)
    found = kernel.sq_norm_lookups(ids, grad)
    assert ((found - sq_B).abs() <= limit * sq_B).all(), f"sq_norm_lookups is off: {found}"
    assert (found >= sq_B * (1 - 2.0**-18)).all(), "sq_norm_lookups is below the true norm"
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    formed, summed = tables.to(wide), torch.einsum("b,bvd->vd", factor_B, tables)
    if batch > 1:
        grad, formed, factor_B = grad.clone(), formed.clone(), factor_B.clone()
        grad[1], formed[1], factor_B[1] = float("nan"), float("inf"), 0.0
        summed = torch.einsum("b,bvd->vd", factor_B, tables)
    for add in (
        lambda t: kernel.add_lookups_(t, ids, grad, factor_B),
        lambda t: kernel.add_weighted_(t, formed, factor_B),
    ):
        total = torch.ones(5, width, dtype=wide, device=grad.device)
        add(total)
        off = (total.double() - 1.0 - summed).norm()
        assert off <= limit * (1.0 + summed.norm()), f"a weighted sum is off: {off}"


def _assert_normalisation(
    kernel: NormKernel, x: Tensor, gain: Tensor, grad: Tensor, centred: bool, limit: float
) -> None:
    """Compare with autograd in fp64, one gain for each sample."""
    leaf = x.double().requires_grad_()
    gain_BD = gain.double().expand(len(x), -1).clone().requires_grad_()
    rows = leaf - leaf.mean(-1, keepdim=True) if centred else leaf
    unit = rows * (rows.square().mean(-1, keepdim=True) + 0.1).rsqrt()
    exact = torch.autograd.grad(unit * gain_BD[:, None], (leaf, gain_BD), grad.double())
    found = kernel.normalisation_backward(x, gain, grad, eps=0.1, centred=centred)
    assert found[0].dtype == x.dtype, f"normalisation_backward returned {found[0].dtype}"
    for mine, true in zip(found, exact, strict=True):
        off = (mine.double() - true).norm()
        assert off <= limit * max(1.0, float(true.norm())), f"normalisation_backward is off: {off}"
