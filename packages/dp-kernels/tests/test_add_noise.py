"""Gaussian noise of counter-based streams: one draw for every sharding, and tails to 9.4 sigma."""

from __future__ import annotations

import math
import os
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from veilspan.kernels import TritonNoise, add_noise_
from veilspan.kernels.ops import add_noise as op
from veilspan.kernels.streams import STREAM_NAMES, derive, words
from veilspan.kernels.testing import Fence, random

KEY = bytes(range(32))
STREAMS = list(STREAM_NAMES)
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def with_numpy(
    tensor: Tensor,
    *,
    stddev: float = 1.0,
    step: int = 0,
    name: str = "w",
    offset: int = 0,
    scale: float = 1.0,
    stream: str = "chacha20",
) -> Tensor:
    """Return what the formulation without Triton makes of a tensor."""
    subkey = torch.from_numpy(derive(KEY, stream, step, name).view(np.int32))
    found = tensor.cpu().clone()
    op._add(found, subkey, *op._checked(stddev, scale), offset, stream)
    return found


def draw(length: int, **address: object) -> NDArray[np.float64]:
    return with_numpy(torch.zeros(length), **address).double().numpy()  # pyright: ignore


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "offset"),
    [((1,), 0), ((), 2047), ((13, 7), 2**35 + 2000), ((2049,), 1), ((130,), 2**62)],
)
def test_kernels_and_numpy_draw_the_same_bits(
    stream: str, dtype: torch.dtype, shape: tuple[int, ...], offset: int, fence: Fence
) -> None:
    start = random(*shape, dtype=dtype)
    found = fence(start)
    options = {"stddev": 3.7, "offset": offset, "scale": 1 / 3, "stream": stream}
    add_noise_(found, key=KEY, step=0, name="w", **options)
    expected = with_numpy(start, **options)
    # The interpreter cuts where a GPU rounds to bf16.
    ulp = 2.0**-7 if dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(found.cpu(), expected, rtol=ulp, atol=0.0)
    assert not torch.equal(found, start)


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0, 2**32 * 16 - 700])
def test_shards_of_any_cut_are_parts_of_the_whole(
    stream: str, dtype: torch.dtype, offset: int, device: torch.device
) -> None:
    whole = random(2500, dtype=dtype)
    parts = [part.clone() for part in whole.split([1, 300, 1699, 3, 497])]
    address = {"key": KEY, "stddev": 0.3, "step": 2, "name": "w", "stream": stream, "scale": 0.7}
    add_noise_(whole, offset=offset, **address)
    for part in parts:
        add_noise_(part, offset=offset, **address)
        offset += part.numel()
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_serves_shards_across_its_own_pieces(dtype: torch.dtype) -> None:
    whole = with_numpy(torch.zeros(150_001, dtype=dtype), offset=7)
    parts = [
        with_numpy(torch.zeros(length, dtype=dtype), offset=start)
        for start, length in ((7, 65_543), (65_550, 1), (65_551, 84_457))
    ]
    assert torch.equal(torch.cat(parts), whole)


# Found by a search: blocks in whose pair the radius word lies below 256.
@pytest.mark.parametrize(
    ("stream", "block", "pair"), [("chacha20", 584982, 3), ("philox4x32", 598298, 2)]
)
def test_small_radius_words_take_more_bits(
    stream: str, block: int, pair: int, device: torch.device
) -> None:
    subkey = derive(KEY, stream, 0, "w")
    radius = words(stream, subkey, np.array([block], np.uint64), 0)[2 * pair, 0]
    more = int(words(stream, subkey, np.array([block], np.uint64), 1)[pair, 0])
    assert radius < 256
    exact = -2.0 * math.log((int(radius) * 2**32 + more + 0.5) / 2**64)
    tile, column = divmod(block, 128)
    tensor = torch.zeros(2048, device=device)
    add_noise_(tensor, key=KEY, stddev=1.0, step=0, name="w", offset=2048 * tile, stream=stream)
    first, second = tensor.view(16, 128)[2 * pair : 2 * pair + 2, column].double()
    assert float(first**2 + second**2) == pytest.approx(exact, rel=1e-6)
    assert torch.equal(
        tensor.cpu(), with_numpy(torch.zeros(2048), offset=2048 * tile, stream=stream)
    )


@pytest.mark.parametrize("stream", STREAMS)
def test_noise_follows_the_normal_law(stream: str) -> None:
    stats = pytest.importorskip("scipy.stats")
    noise = draw(2**19, stddev=2.0, name="law", stream=stream) / 2.0
    assert stats.kstest(noise, "norm").pvalue > 0.01
    error = 1 / math.sqrt(noise.size)
    for power, moment, deviation in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs((noise**power).mean() - moment) < 4 * math.sqrt(deviation) * error
    beyond = np.count_nonzero(np.abs(noise) > 4)
    assert beyond == pytest.approx(noise.size * 2 * stats.norm.sf(4), abs=4 * 5.8)


@pytest.mark.parametrize("stream", STREAMS)
def test_steps_names_and_places_are_independent(stream: str) -> None:
    length = 2**17
    base = draw(length, stream=stream)
    others = [
        draw(length, step=1, stream=stream),
        draw(length, name="v", stream=stream),
        draw(length, offset=2**40, stream=stream),
        *(np.roll(base, shift) for shift in (1, 16, 128, 256, 2048)),
        base.reshape(-1, 2, 128)[:, ::-1].reshape(-1),  # the other normal of the same pair
    ]
    for other in others:
        for left, right in ((base, other), (base**2, other**2)):
            assert abs(np.corrcoef(left, right)[0, 1]) < 4.5 / math.sqrt(length)


def test_the_sum_is_scaled_and_rounded_once(device: torch.device) -> None:
    start = random(300, dtype=torch.bfloat16)
    found = start.float()
    add_noise_(found, key=KEY, stddev=0.5, step=0, name="w", scale=0.25)
    narrow = start.clone()
    add_noise_(narrow, key=KEY, stddev=0.5, step=0, name="w", scale=0.25)
    torch.testing.assert_close(narrow.float(), found, rtol=2.0**-7, atol=0.0)
    assert torch.equal(with_numpy(start, stddev=0.5, scale=0.25), found.cpu().bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_deviation_adds_nothing(dtype: torch.dtype, device: torch.device) -> None:
    tensor = random(70, dtype=dtype)
    expected = tensor.clone()
    add_noise_(tensor, key=KEY, stddev=0.0, step=0, name="w")
    assert torch.equal(tensor, expected)


def test_the_deviation_is_never_rounded_down() -> None:
    for stddev in (0.1, 0.3, 1 / 3, 1e-30, 12345.678):
        rounded, _ = op._checked(stddev, 1.0)
        assert rounded >= stddev
        assert rounded == float(np.float32(rounded))


def test_tensors_may_have_any_strides_or_no_elements(device: torch.device) -> None:
    wide = random(12, 10)
    view, dense = wide[::2].mT, wide[::2].mT.clone(memory_format=torch.contiguous_format)
    address = {"key": KEY, "stddev": 1.0, "step": 0, "name": "w"}
    between = wide[1::2].clone()
    add_noise_(view, **address)
    add_noise_(dense, **address)
    assert torch.equal(view, dense)
    assert torch.equal(wide[1::2], between)
    add_noise_(torch.empty(0, 3, device=device), **address)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensor": torch.zeros(4, dtype=torch.float16)}, "tensor is torch.float16; it must be"),
        ({"tensor": torch.zeros(4, dtype=torch.int64)}, "tensor is torch.int64"),
        ({"key": b"short"}, "key is a bytes of length 5; it must be 32 secret bytes"),
        ({"key": bytes(32)}, "key has only 1 distinct byte values"),
        ({"stddev": -1.0}, "stddev is -1.0"),
        ({"stddev": float("nan")}, "stddev is nan"),
        ({"stddev": 1e39}, "stddev is 1e[+]39; it must be finite in fp32"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"scale": float("inf")}, "scale is inf"),
        ({"step": -1}, "step is -1; it must be a whole number"),
        ({"step": 1.5}, "step is 1.5"),
        ({"offset": True}, "offset is True"),
        ({"offset": 2**63 - 2}, "offset [+] numel is"),
        ({"stream": "mt19937"}, "stream is 'mt19937'; it must be one of 'chacha20', 'philox4x32'"),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    arguments = {"key": KEY, "stddev": 1.0, "step": 0, "name": "w", **change}
    with pytest.raises(ValueError, match=message):
        add_noise_(arguments.pop("tensor", torch.zeros(4)), **arguments)


def test_torch_compile_sees_the_op_without_graph_breaks(device: torch.device) -> None:
    subkey = torch.arange(8, dtype=torch.int32)

    def noisy(tensor: Tensor) -> Tensor:
        tensor = tensor * 2.0
        torch.ops.veilspan.add_noise_(tensor, subkey, 1.0, 0.5, 3, "philox4x32")
        return tensor

    tensor = random(9)
    compiled = torch.compile(noisy, backend="eager", fullgraph=True)
    assert torch.equal(compiled(tensor), noisy(tensor))
    torch.library.opcheck(
        torch.ops.veilspan.add_noise_.default, (tensor, subkey, 1.0, 0.5, 3, "chacha20")
    )


PTX = """
from veilspan.kernels.aot import assembly
from veilspan.kernels.ops.add_noise import compilations
print(assembly(next(compilations("sm_90")), "sm_90"))
"""


def test_kernels_use_only_arithmetic_that_ieee_754_defines() -> None:
    pytest.importorskip("triton")
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PTX]
    ptx = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    used = set(re.findall(r"\b[a-z][a-z0-9]*\.[\w.]*f32[\w.]*", ptx.stdout))
    arithmetic = {name for name in used if not name.startswith(("cvt", "mov", "selp", "setp"))}
    arithmetic.discard("neg.f32")  # a change of sign is exact, and not every Triton uses one
    assert arithmetic == {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "sqrt.rn.f32"}
    assert not [name for name in used if "ftz" in name or "approx" in name]


@pytest.mark.parametrize("stream", STREAMS)
def test_the_object_draws_what_the_op_draws(stream: str, device: torch.device) -> None:
    mine, theirs = torch.zeros((2, 99), device=device)
    TritonNoise(KEY, stream=stream).add_(mine, stddev=2.0, step=5, name="w", offset=3)
    add_noise_(theirs, key=KEY, stddev=2.0, step=5, name="w", offset=3, stream=stream)
    assert torch.equal(mine, theirs)


def test_the_object_keeps_its_key_and_refuses_narrow_sums() -> None:
    noise = TritonNoise(KEY, stream="philox4x32")
    assert noise.stream_name == "philox-4x32-10, not cryptographic"
    assert repr(noise) == "TritonNoise(philox-4x32-10, not cryptographic, secret key)"
    with pytest.raises(TypeError, match="holds a secret key"):
        pickle.dumps(noise)
    with pytest.raises(ValueError, match=r"tensor is torch\.bfloat16; it must be one of float32"):
        noise.add_(torch.zeros(2).bfloat16(), stddev=1.0, step=0, name="w", offset=0)
    with pytest.raises(ValueError, match="distinct"):
        TritonNoise(bytes(32))
    with pytest.raises(ValueError, match="stream is 'x'"):
        TritonNoise(KEY, stream="x")


def test_the_object_serves_a_private_step_of_core(device: torch.device) -> None:
    core = pytest.importorskip("veilspan.core")
    protocols = pytest.importorskip("veilspan.core.protocols")
    assert isinstance(TritonNoise(KEY), protocols.NoiseSource)
    gradients = []
    for noise_multiplier in (0.0, 2.0):
        model = torch.nn.Linear(3, 2, bias=False, device=device)
        torch.nn.init.ones_(model.weight)
        step = core.PrivateStep(
            model,
            clipping=core.Flat(clip_norm=1.0),
            noise_multiplier=noise_multiplier,
            expected_batch_size=4.0,
            noise=TritonNoise(KEY),
        )
        with step:
            step.backward(model(random(4, 3)).square().sum(1))
        gradients.append(model.weight.grad)
        step.detach()
    exact, noisy = gradients
    expected = torch.zeros_like(exact)
    add_noise_(expected, key=KEY, stddev=2.0, step=0, name="weight")
    torch.testing.assert_close(4.0 * (noisy - exact), expected, rtol=1e-4, atol=1e-5)
