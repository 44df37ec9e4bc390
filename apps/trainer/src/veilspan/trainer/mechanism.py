"""The mechanism that a recipe asks for: clipping, norms and noise, and who computes them."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import torch

from veilspan.accounting import PrivacyPlan
from veilspan.core import (
    Automatic,
    Clip,
    Flat,
    GaussianNoise,
    PerBlock,
    PerLayer,
    PerParameter,
    PhiloxNoise,
    Sketch,
    new_key,
)
from veilspan.core.protocols import NoiseSource, NormKernel
from veilspan.core.testing import assert_kernel_conforms
from veilspan.trainer.errors import TrainerError
from veilspan.trainer.recipe import Recipe

GROUPS = {"flat": Flat, "block": PerBlock, "layer": PerLayer, "parameter": PerParameter}
"""Kinds of clipping groups by the name that recipes use."""

_COMPARED = 2**14 + 5  # elements of noise: some tiles of a kernel, and a part of one


def mechanism(recipe: Recipe, plan: PrivacyPlan) -> dict[str, Any]:
    """Return what a recipe says of the mechanism, noise apart, as arguments of `PrivateStep`.

    Raises:
        TrainerError: If a package is missing for it.
    """
    privacy, compute, law = recipe.privacy, recipe.compute, plan.norms
    rule = Clip() if privacy.clipping == "clip" else Automatic(gamma=privacy.gamma)
    return {
        "clipping": GROUPS[privacy.groups](clip_norm=plan.clip_norm, rule=rule),
        "noise_multiplier": plan.noise_multiplier,
        "expected_batch_size": plan.expected_batch_size,
        "backward": compute.backward,
        "norms": Sketch(probes=law.probes, blocks=law.blocks) if law else compute.norms,
        "accumulate": privacy.sums,
        "kernel": _triton_kernel() if compute.kernels == "triton" else None,
    }


def noise_source(name: str, key: bytes) -> NoiseSource:
    """Return the noise that `privacy.noise` names.

    Raises:
        TrainerError: If a package is missing for it.
    """
    if name == "aes":
        return GaussianNoise(key)
    if name == "philox":
        return PhiloxNoise(key)
    _require_kernels("privacy.noise", name, "aes")
    from veilspan.kernels import TritonNoise

    return TritonNoise(key, stream=name)


def check_arithmetic(recipe: Recipe, device: torch.device) -> None:
    """Compare what kernels compute on this device with what is obvious, on numbers of nobody.

    A compiler or a device that is wrong would otherwise be seen in no loss and in no figure.

    Raises:
        TrainerError: If a norm or a sum is off, or noise is not that of the CPU to the bit.
    """
    if recipe.compute.kernels == "triton":
        if sys.flags.optimize:  # -O takes assertions out, and the conformance suite with them
            raise TrainerError(
                'compute.kernels is "triton", whose kernels are checked before a run, and python '
                '-O takes the checks out. Start it without -O, or set compute.kernels = "torch".'
            )
        try:
            dtype = getattr(torch, recipe.model.dtype)
            assert_kernel_conforms(_triton_kernel(), dtype=dtype, device=device)
        except AssertionError as error:
            raise TrainerError(
                f'compute.kernels is "triton", and its kernels are wrong on {device}: {error} '
                'Set compute.kernels = "torch".'
            ) from error
    if recipe.privacy.noise == "chacha20" and not draws_alike(
        noise_source("chacha20", new_key()), device
    ):
        raise TrainerError(
            f'privacy.noise is "chacha20", and its kernel draws other noise on {device} than the '
            'CPU does from the same key. Set privacy.noise = "aes".'
        )


def draws_alike(noise: NoiseSource, device: torch.device) -> bool:
    """Return whether noise is the same on a device as on the CPU, to the bit."""
    here, there = torch.zeros(_COMPARED), torch.zeros(_COMPARED, device=device)
    for part in (here, there):
        noise.add_(part, stddev=1.0, step=0, name="compared", offset=3)
    return torch.equal(here, there.cpu()) and int(here.count_nonzero()) > _COMPARED // 2


def _triton_kernel() -> NormKernel:
    _require_kernels("compute.kernels", "triton", "torch")
    from veilspan.kernels import TritonKernel

    return TritonKernel()


def _require_kernels(key: str, value: str, other: str) -> None:
    if importlib.util.find_spec("veilspan.kernels") is None:
        raise TrainerError(
            f"{key} is \"{value}\", which needs: pip install 'veilspan-trainer[kernels]'. "
            f'Or set {key} = "{other}".'
        )
