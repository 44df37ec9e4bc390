"""What decides between kernels of products and the library."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from veilspan.kernels import clipped_sum, direct_norm, launch, per_sample_grad
from veilspan.kernels.launch import ARCHITECTURES, Configuration, configured
from veilspan.kernels.testing import random
from veilspan.kernels.tiles import plan

RECORD = Path(__file__).with_name("compiled.json")
OPS = ["clipped_sum", "direct_norm", "per_sample_grad"]


def planned(monkeypatch: pytest.MonkeyPatch, *tensors: torch.Tensor) -> dict[str, int]:
    """Return the sizes that a plan asks the table for."""
    asked: dict[str, Any] = {}

    def configuration(op: str, device: torch.device, **sizes: int) -> Configuration:
        asked.update(sizes)
        return Configuration(blocks={})

    monkeypatch.setattr("veilspan.kernels.tiles.configuration", configuration)
    plan("direct_norm", *tensors)
    return asked


def test_a_plan_knows_sizes_and_alignment(monkeypatch: pytest.MonkeyPatch) -> None:
    act_BTI = random(2, 5, 32, dtype=torch.bfloat16)
    grad_BTO = random(2, 5, 48, dtype=torch.bfloat16)
    sizes = {"samples": 2, "tokens": 5, "inputs": 32, "outputs": 48, "bytes": 2, "odd": 0}
    assert planned(monkeypatch, act_BTI, grad_BTO) == sizes
    assert planned(monkeypatch, act_BTI.float(), grad_BTO)["bytes"] == 4
    copied = random(2, 32, 5, dtype=torch.bfloat16).mT  # its copy begins at even addresses
    assert planned(monkeypatch, copied, grad_BTO)["odd"] == 0


@pytest.mark.parametrize("which", ["features", "address", "stride", "result"])
def test_a_plan_sees_odd_addresses(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    act_BTI = random(2, 5, 32, dtype=torch.bfloat16)
    grad_BTO = random(2, 5, 48, dtype=torch.bfloat16)
    tensors = {
        "features": [random(2, 5, 33), grad_BTO],
        "address": [random(2, 5, 80)[:, :, 1:33], grad_BTO],
        "stride": [random(2, 5, 33)[:, :, :32], grad_BTO],
        "result": [act_BTI, grad_BTO, random(48, 33)],
    }[which]
    assert planned(monkeypatch, *tensors)["odd"] == 1


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("table", [*ARCHITECTURES, "default", "interpreter"])
def test_every_size_has_a_row(op: str, table: str) -> None:
    huge = dict.fromkeys(("samples", "tokens", "inputs", "outputs"), 1 << 40)
    for number in (2, 4):
        for odd in (0, 1):
            assert configured(op, table, bytes=number, odd=odd, **huge)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("table", ARCHITECTURES)
def test_long_samples_go_to_the_library_unless_they_are_fp32(op: str, table: str) -> None:
    sizes = {"samples": 1, "inputs": 4096, "outputs": 4096, "odd": 0}
    assert configured(op, table, tokens=8192, bytes=2, **sizes).route == "library"
    assert configured(op, table, tokens=512, bytes=2, **sizes).route == "kernel"
    assert configured(op, table, tokens=8192, bytes=4, **sizes).route == "kernel"


@pytest.mark.parametrize(
    ("major", "minor", "shared", "rows_of"),
    [
        (8, 0, 163, "sm_80"),
        (8, 9, 99, "sm_80"),
        (9, 0, 227, "sm_90"),
        (10, 0, 227, "sm_90"),
        (12, 0, 99, "sm_80"),
    ],
)
def test_a_gpu_gets_blocks_that_its_shared_memory_holds(
    major: int, minor: int, shared: int, rows_of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(
        major=major, minor=minor, shared_memory_per_block_optin=shared * 1024
    )
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch.torch.version, "hip", None)
    monkeypatch.setattr(launch.torch.cuda, "get_device_properties", lambda _: properties)
    table = launch.architecture(torch.device("cuda"))
    assert launch.rows("direct_norm", table) == launch.rows("direct_norm", rows_of)
    most = max(row["shared"] for row in json.loads(RECORD.read_text())[rows_of].values())
    assert most <= shared * 1024


def test_the_route_of_the_table_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Configuration(blocks={}, route="library")
    monkeypatch.setattr("veilspan.kernels.tiles.configuration", lambda *_, **__: library)
    act_BTI, grad_BTO = random(2, 5, 3), random(2, 5, 4)
    grad_BOI = grad_BTO.mT @ act_BTI
    sq_norm_B = grad_BOI.square().sum((1, 2)).double()
    factor_B = torch.ones(2, device=act_BTI.device)
    for found, right in [
        (direct_norm(act_BTI, grad_BTO), sq_norm_B),
        (per_sample_grad(act_BTI, grad_BTO)[0], grad_BOI),
        (per_sample_grad(act_BTI, grad_BTO)[1], sq_norm_B),
        (clipped_sum(act_BTI, grad_BTO, factor_B), grad_BOI.sum(0)),
    ]:
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


def test_a_kernel_is_launched_on_the_device_of_its_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    devices: list[torch.device] = []
    seen: list[tuple[Any, ...]] = []

    @contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        devices.append(tensor.device)
        yield
        devices.pop()

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments, **options: seen.append((*devices, grid, arguments, options))

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    there = torch.empty(2, device="meta")
    Configuration(blocks={"BLOCK": 8}, num_warps=2).launch(Kernel(), (3,), there, 7, ADD=True)
    options = {"BLOCK": 8, "ADD": True, "num_warps": 2, "num_stages": 3, "enable_fp_fusion": False}
    assert seen == [(there.device, (3,), (there, 7), options)]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_ops_serve_a_gpu_that_is_not_the_current_one() -> None:
    act_BTI, grad_BTO = (random(2, 5, 32).to("cuda:1") for _ in range(2))
    with torch.cuda.device(0):
        sq_B = direct_norm(act_BTI, grad_BTO)
    torch.testing.assert_close(sq_B.cpu(), direct_norm(act_BTI.cpu(), grad_BTO.cpu()))
