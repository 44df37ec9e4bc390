"""ChaCha20 and Philox4x32, in NumPy and inside kernels, against their published words."""

from __future__ import annotations

from typing import no_type_check

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from veilspan.kernels.compat import jit, tl
from veilspan.kernels.streams import (
    STREAM_NAMES,
    chacha20,
    chacha20_block,
    derive,
    philox,
    philox_block,
    words,
)

KEY = bytes(range(32))
BLOCKS = [0, 1, 77, 2**32 - 1, 2**32, 2**40 + 12345, 2**59 - 1]


def row(*numbers: int) -> NDArray[np.uint32]:
    return np.array(numbers, np.uint32)


def test_chacha20_gives_the_block_of_rfc_8439() -> None:
    key = np.frombuffer(KEY, "<u4").astype(np.uint32)
    found = chacha20(key, row(1), row(0x09000000), 0x4A000000)[:, 0]
    expected = """
        e4e7f110 15593bd1 1fdd0f50 c47120a3 c7f4d1c7 0368c033 9aaa2204 4e6cd4c3
        466482d2 09aa9f07 05d7c214 a2028bd9 d19c12b5 b94e16de e883d0cb 4e3c50a2
    """
    assert [f"{word:08x}" for word in found] == expected.split()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("purpose", [0, 1])
def test_chacha20_equals_the_library_of_core(block: int, purpose: int) -> None:
    ciphers = pytest.importorskip("cryptography.hazmat.primitives.ciphers")
    subkey = derive(KEY, "chacha20", 3, "weight")
    start = block.to_bytes(8, "little") + purpose.to_bytes(8, "little")
    chacha = ciphers.algorithms.ChaCha20(subkey.tobytes(), start)
    stream = ciphers.Cipher(chacha, None).encryptor().update(bytes(64))
    found = words("chacha20", subkey, np.array([block], np.uint64), purpose)[:, 0]
    assert found.tobytes() == stream


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(
    counter: tuple[int, ...], key: tuple[int, ...], expected: str
) -> None:
    c0, c1, c2, c3 = counter
    found = philox(row(c0), row(c1), row(c2), row(*key, c3))[:, 0]
    assert " ".join(f"{word:08x}" for word in found) == expected


@jit
@no_type_check
def _words_kernel(table, numbers, output, PURPOSE: tl.constexpr, CHACHA: tl.constexpr):
    lane = tl.arange(0, 8)
    block = tl.load(numbers + lane)
    low, high = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    if CHACHA:
        found = chacha20_block(table, low, high, PURPOSE)
    else:
        found = philox_block(table, low, high, PURPOSE)
    for place in tl.static_range(16):
        tl.store(output + place * 8 + lane, found[place].to(tl.int64))


@pytest.mark.parametrize("stream", list(STREAM_NAMES))
@pytest.mark.parametrize("purpose", [0, 1])
def test_kernels_draw_the_words_of_numpy(stream: str, purpose: int, device: torch.device) -> None:
    pytest.importorskip("triton")
    subkey = derive(KEY, stream, 2**60, "layer.0")
    numbers = torch.tensor([*BLOCKS, 5], dtype=torch.int64, device=device)
    table = torch.tensor([int(word) for word in subkey], dtype=torch.int64, device=device)
    output = torch.empty((16, 8), dtype=torch.int64, device=device)
    _words_kernel[(1,)](table, numbers, output, PURPOSE=purpose, CHACHA=stream == "chacha20")
    expected = words(stream, subkey, np.array([*BLOCKS, 5], np.uint64), purpose)
    assert np.array_equal(output.cpu().numpy(), expected.astype(np.int64))


def test_subkeys_differ_by_every_part_of_the_address() -> None:
    addresses = [("chacha20", 0, "a"), ("chacha20", 1, "a"), ("chacha20", 0, "b")]
    subkeys = [derive(KEY, *address).tobytes() for address in addresses]
    subkeys += [derive(KEY, "philox4x32", 0, "a").tobytes(), derive(KEY[::-1], *addresses[0])]
    assert len({bytes(subkey) for subkey in subkeys}) == 5
