"""Errors for arguments that a kernel must not see."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of operands."""

WIDE = (torch.float64, torch.float32)
"""Dtypes in which sums, norms and factors are held."""


def require_dtype(argument: str, tensor: Tensor, allowed: Sequence[torch.dtype] = FLOATS) -> None:
    """Raise unless the dtype is allowed.

    Raises:
        ValueError: If it is not; names the argument, its dtype and what is allowed.
    """
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise ValueError(
            f"{argument} is {tensor.dtype}; it must be one of {names}. Convert it with .to(...)."
        )


def require_shape(argument: str, tensor: Tensor, shape: Sequence[int | str]) -> None:
    """Raise unless the shape is as given.

    Args:
        argument: Name to use in the error message.
        tensor: What was passed.
        shape: Length of each dimension, or its letter where any length will do.

    Raises:
        ValueError: If the shape differs.
    """
    fits = tensor.dim() == len(shape) and all(
        isinstance(wanted, str) or wanted == found
        for wanted, found in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(length) for length in shape)
        raise ValueError(f"{argument} has shape {list(tensor.shape)}; it must be [{wanted}].")


def require_together(**tensors: Tensor) -> None:
    """Raise unless all tensors are plain ones on one device.

    Raises:
        ValueError: If one is a DTensor or lies elsewhere; names it and the first argument.
    """
    (first, reference), *_ = tensors.items()
    for argument, tensor in tensors.items():
        if hasattr(tensor, "to_local"):
            raise ValueError(f"{argument} is a DTensor; pass its local shard, .to_local().")
        if tensor.device != reference.device:
            raise ValueError(
                f"{argument} is on {tensor.device} and {first} on {reference.device}; all "
                f"arguments must be on one device. Move it with .to({str(reference.device)!r})."
            )


def without_tiny(factors: Tensor) -> Tensor:
    """Return factors, 0 in place of those that are no normal number in fp32.

    Rounded up, such a factor would let a contribution exceed the clip norm.
    """
    return torch.where(factors.abs() < torch.finfo(torch.float32).tiny, 0.0, factors)


def require_finite(argument: str, tensor: Tensor) -> None:
    """Raise if an element is not finite.

    On a GPU the check runs on the device: it costs no synchronisation, and CUDA reports the error
    with the next call that waits.

    Raises:
        ValueError: If an element is not finite, on the CPU.
    """
    message = f"{argument} must be finite: a factor of NaN or infinity would spoil the whole sum."
    if tensor.device.type == "cpu":
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{message} Set it to 0 to drop a sample.")
    else:
        torch.ops.aten._assert_async.msg(torch.isfinite(tensor).all(), message)


def require_linear(act_BTI: Tensor, grad_BTO: Tensor) -> None:
    """Raise unless these are the input and the output gradient of one linear map.

    Raises:
        ValueError: If a shape, a dtype or a device does not fit.
    """
    require_together(act_BTI=act_BTI, grad_BTO=grad_BTO)
    require_dtype("act_BTI", act_BTI)
    require_dtype("grad_BTO", grad_BTO)
    require_shape("act_BTI", act_BTI, ("B", "T", "I"))
    require_shape("grad_BTO", grad_BTO, (*act_BTI.shape[:2], "O"))


def require_factors(factor_B: Tensor, samples: int) -> None:
    """Raise unless this holds one finite factor for each sample.

    Raises:
        ValueError: If the dtype or the shape does not fit, or a factor is not finite.
    """
    require_dtype("factor_B", factor_B, WIDE)
    require_shape("factor_B", factor_B, (samples,))
    require_finite("factor_B", factor_B)


def require_total(total: Tensor, outputs: int, inputs: int) -> None:
    """Raise unless a sum over samples can be added to this.

    Raises:
        ValueError: If the dtype or the shape does not fit, or the tensor is not contiguous.
    """
    require_dtype("total", total, WIDE)
    require_shape("total", total, (outputs, inputs))
    if not total.is_contiguous():
        raise ValueError("total is not contiguous; pass .contiguous() memory.")


def require_ids(argument: str, ids: Tensor, count: int | None, *, ignore: int | None) -> None:
    """Raise if an id is outside of `[0, count)` and is not `ignore`; any count if that is None.

    On a GPU the check runs on the device, as in `require_finite`.

    Raises:
        ValueError: If the dtype does not fit, or on the CPU if an id does not; says how many.
    """
    require_dtype(argument, ids, (torch.int64, torch.int32))
    wrong = ids < 0 if count is None else (ids < 0) | (ids >= count)
    if ignore is not None:
        wrong = wrong & (ids != ignore)
    allowed = f"must be in [0, {'…' if count is None else count})"
    if ignore is not None:
        allowed += f" or {ignore}"
    if ids.device.type == "cpu":
        found = int(wrong.sum())
        if found:
            raise ValueError(f"{argument}: {found} of {ids.numel()} positions {allowed}.")
    else:
        torch.ops.aten._assert_async.msg(~wrong.any(), f"{argument}: every position {allowed}.")
