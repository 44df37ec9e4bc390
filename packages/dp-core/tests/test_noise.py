"""Noise: its law, its addresses, and what it refuses."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from veilspan.core import noise as noise_module
from veilspan.core.noise import Buffers, GaussianNoise, PhiloxNoise, gaussian_pairs, new_key
from veilspan.core.protocols import NoiseSource
from veilspan.core.streams import AesCtr, Philox4x64, derive, read_words

KEY = derive(bytes(range(32)), "tests of noise", 0)
SOURCES = [GaussianNoise, PhiloxNoise]
MILLION = 1_000_000


def draw(source=None, *, size=MILLION, step=0, name="w", offset=0, stddev=1.0, dtype=torch.float64):
    tensor = torch.zeros(size, dtype=dtype)
    (source or GaussianNoise(KEY)).add_(tensor, stddev=stddev, step=step, name=name, offset=offset)
    return tensor


def correlation(a, b):
    return abs(float(np.corrcoef(a.numpy(), b.numpy())[0, 1]))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("make", SOURCES)
def test_every_source_fits_the_seam(make):
    assert isinstance(make(KEY), NoiseSource)


@pytest.mark.parametrize("make", SOURCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_and_distribution_are_those_of_the_normal_law(make, dtype):
    noise = draw(make(KEY), stddev=3.0, dtype=dtype).double().numpy() / 3.0
    assert abs(noise.std() - 1) < 0.004  # 5.6 standard errors; the promise is 1 %
    assert abs(noise.mean()) < 0.005
    assert abs(stats.skew(noise)) < 0.0125
    assert abs(stats.kurtosis(noise)) < 0.025
    assert stats.kstest(noise, "norm").pvalue > 1e-4


def test_both_members_of_a_pair_are_normal_and_uncorrelated_also_in_size():
    pairs = draw().view(-1, 2)
    for member in pairs.T:
        assert stats.kstest(member.numpy(), "norm").pvalue > 1e-4
    assert correlation(pairs[:, 0], pairs[:, 1]) < 5.7e-3  # 4 standard errors
    assert correlation(pairs[:, 0].abs(), pairs[:, 1].abs()) < 5.7e-3


def test_frequency_of_large_values_is_that_of_the_normal_law():
    noise = draw(size=4 * MILLION, dtype=torch.float32)
    for bound in (2.0, 3.0, 4.0, 4.5):
        expected = noise.numel() * 2 * stats.norm.sf(bound)
        assert abs(int((noise.abs() > bound).sum()) - expected) < 4.5 * expected**0.5


def crafted(first, second, stddev=1.0):
    buffers = Buffers(1, 1)
    buffers.words[0, :, 0] = first, second
    return gaussian_pairs(buffers, stddev)[0, 0].copy()


@pytest.mark.parametrize(
    ("word", "radius"),
    [
        (0, (2 * 65 * np.log(2)) ** 0.5),  # 9.49
        (1, (-2 * np.log(1.5 * 2.0**-64)) ** 0.5),
        (2**32, (2 * 32 * np.log(2)) ** 0.5),
        (2**62, (2 * 2 * np.log(2)) ** 0.5),
        (2**63 - 1, (2 * np.log(2)) ** 0.5),
        (-(2**63), (2 * np.log(2)) ** 0.5),  # as an unsigned word, 2⁶³
        (-1, 0.0),  # the largest word
    ],
)
def test_tails_reach_beyond_nine_sigma_and_no_word_gives_an_infinite_value(word, radius):
    for angle in (0, 1, -1, 2**62, -(2**63), 2**63 - 1, 0x123456789ABCDEF):
        pair = crafted(word, angle)
        assert np.isfinite(pair).all()
        assert np.hypot(*pair) == pytest.approx(radius, abs=1e-9)


def test_the_angle_is_the_middle_of_an_arc_turned_within_the_arc_to_double_precision():
    angles = read_words(AesCtr().stream(KEY), 0, 20_000)[:, 1]
    corners = np.array([0, -1, 1, 2**63 - 1, -(2**63), 2**49, 2**49 - 1, -(2**49)], np.int64)
    buffers = Buffers(1, len(angles) + len(corners))
    buffers.words[0, 0] = 2**40
    buffers.words[0, 1] = np.concatenate([angles, corners])
    pairs = gaussian_pairs(buffers, 1.0)[0]
    word = buffers.words[0, 1]
    within = ((word + 2**49) & (2**50 - 1)) - 2**49  # lower 50 bits, signed
    theta = (word >> 50) + 0.5 + within.astype(np.longdouble) * np.longdouble(2) ** -50
    theta *= 2 * np.longdouble(np.pi) / 2**14
    expected = np.stack([np.cos(theta), np.sin(theta)], axis=1) * np.hypot(*pairs.T)[:, None]
    assert np.abs(pairs - expected.astype(np.float64)).max() < 2e-14


def test_the_angle_covers_the_circle_evenly():
    angles = np.sort(np.arctan2(*draw().view(-1, 2).numpy().T))
    assert stats.kstest(angles, "uniform", args=(-np.pi, 2 * np.pi)).pvalue > 1e-4


slices = st.lists(st.integers(0, 40_000), min_size=1, max_size=6)


@settings(max_examples=25, deadline=None)
@given(
    cuts=slices,
    offset=st.integers(0, 20_000),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_slicing_of_a_tensor_gives_the_same_bits(cuts, offset, dtype):
    whole = draw(size=40_000, offset=offset, dtype=dtype)
    edges = [0, *sorted(cuts), 40_000]
    parts = [
        draw(size=end - begin, offset=offset + begin, dtype=dtype)
        for begin, end in itertools.pairwise(edges)
    ]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("make", SOURCES)
def test_single_elements_far_into_a_tensor_are_those_of_the_whole(make):
    source, base = make(KEY), 2**62 + 16_381  # a chunk ends after three elements
    whole = draw(source, size=5, offset=base)
    for i in range(5):
        assert torch.equal(draw(source, size=1, offset=base + i), whole[i : i + 1])


@pytest.mark.parametrize("make", SOURCES)
def test_the_number_of_threads_changes_no_bit(make, threads):
    results, size = [], 3 * MILLION + 1  # so large that each of five has a share
    for count in (1, 2, 3, 5):
        threads(count)
        results.append(draw(make(KEY), size=size, offset=77, dtype=torch.float32))
    assert all(torch.equal(results[0], other) for other in results[1:])
    part = draw(make(KEY), size=MILLION, offset=77 + MILLION, dtype=torch.float32)
    assert torch.equal(part, results[0][MILLION : 2 * MILLION])


def test_as_many_threads_draw_as_have_enough_to_do(threads, monkeypatch):
    made, original = [], noise_module.ThreadPoolExecutor
    monkeypatch.setattr(
        noise_module, "ThreadPoolExecutor", lambda count: (made.append(count), original(count))[1]
    )
    threads(5)
    draw(size=100_001)
    assert made == []
    draw(size=300_001)
    draw(size=3 * MILLION + 1)
    assert made == [2, 5]


def test_two_sources_with_one_key_agree_and_call_order_does_not_matter():
    first, second = GaussianNoise(KEY), GaussianNoise(KEY)
    a, b = draw(first, size=999, name="a"), draw(first, size=999, name="b")
    other_b, other_a = draw(second, size=999, name="b"), draw(second, size=999, name="a")
    assert torch.equal(a, other_a)
    assert torch.equal(b, other_b)


def test_values_of_both_streams_are_pinned():
    # A change here makes replicas of different versions disagree: bump the version, never the pin.
    pins = {
        name: [round(float(x), 9) for x in draw(source(KEY), size=3, step=5, name="layer.weight")]
        for name, source in (("aes", GaussianNoise), ("philox", PhiloxNoise))
    }
    assert pins == {
        "aes": [1.876273155, 0.840024202, 0.691346867],
        "philox": [0.689219021, -1.29604802, -0.844803883],
    }


@pytest.mark.parametrize("make", SOURCES)
def test_pitfall_04_steps_names_shards_and_keys_share_no_noise(make):
    source = make(KEY)
    draws = [
        draw(source),
        draw(source, step=1),
        draw(source, name="v"),
        draw(source, offset=MILLION),
        draw(source, offset=2 * MILLION),
        draw(make(derive(KEY, "another key", 0))),
    ]
    table = np.corrcoef(np.stack([d.numpy() for d in draws]))
    assert np.abs(table - np.eye(len(draws))).max() < 4 / MILLION**0.5


def test_pitfall_04_replicas_draw_equal_noise():
    a, b = (draw(GaussianNoise(KEY), size=4099, dtype=torch.float32) for _ in range(2))
    assert torch.equal(a, b)


def test_pitfall_04_neighbours_in_the_stream_are_uncorrelated_at_every_lag():
    noise = draw()
    assert max(correlation(noise[:-lag], noise[lag:]) for lag in (1, 2, 3, 4, 4096, 8192)) < 4e-3


def test_the_two_sources_share_no_noise_under_one_key():
    assert correlation(draw(GaussianNoise(KEY)), draw(PhiloxNoise(KEY))) < 4e-3


def test_philox_reads_the_same_words_from_any_block():
    whole = read_words(Philox4x64().stream(KEY), 6, 20)
    for start in range(20):
        assert np.array_equal(
            read_words(Philox4x64().stream(KEY), 6 + start, 20 - start), whole[start:]
        )


def test_aes_words_are_the_published_algorithm_and_pieces_join():
    # NIST SP 800-38A, F.5.5: the key stream is the cipher text xor the plain text.
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    counter = int("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff", 16)
    plain = bytes.fromhex("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51")
    cipher = bytes.fromhex("601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5")
    stream = bytes(a ^ b for a, b in zip(plain, cipher, strict=True))
    assert read_words(AesCtr().stream(key), counter, 2).tobytes() == stream
    long = read_words(AesCtr().stream(KEY), 3, 10_000)
    assert np.array_equal(long[9_000:], read_words(AesCtr().stream(KEY), 9_003, 1_000))


def test_noise_is_added_to_what_is_there_and_rounded_once():
    values = torch.linspace(-5, 5, 10_001)
    noisy = values.clone()
    GaussianNoise(KEY).add_(noisy, stddev=0.1, step=0, name="w", offset=3)
    exact = values.double() + draw(size=10_001, offset=3, stddev=0.1)
    assert torch.equal(noisy, exact.float())


@pytest.mark.parametrize("view", [lambda t: t.T, lambda t: t[:, ::2], lambda t: t[1:, 3:]])
def test_tensors_that_are_not_contiguous_get_the_noise_of_their_flat_elements(view):
    tensor = torch.zeros(40, 30)
    part = view(tensor)
    GaussianNoise(KEY).add_(part, stddev=1.0, step=0, name="w", offset=9)
    expected = draw(size=part.numel(), offset=9, dtype=torch.float32).view(part.shape)
    assert torch.equal(part, expected)
    assert int((tensor != 0).sum()) == part.numel()


def test_parameters_can_take_noise_without_autograd_noticing():
    parameter = torch.nn.Parameter(torch.zeros(5))
    GaussianNoise(KEY).add_(parameter, stddev=1.0, step=0, name="w", offset=0)
    assert parameter.grad_fn is None
    assert parameter.is_leaf
    assert torch.equal(parameter.detach(), draw(size=5, dtype=torch.float32))


def test_a_standard_deviation_of_zero_or_an_empty_tensor_is_left_alone():
    source = GaussianNoise(KEY)
    assert torch.equal(draw(source, size=10, stddev=0.0), torch.zeros(10, dtype=torch.float64))
    assert draw(source, size=0).numel() == 0
    scalar = torch.zeros(())
    source.add_(scalar, stddev=1.0, step=0, name="w", offset=0)
    assert scalar == draw(source, size=1, dtype=torch.float32)[0]


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e200])
def test_extreme_standard_deviations_scale_exactly(scale):
    unit, scaled = draw(size=1000), draw(size=1000, stddev=scale)
    torch.testing.assert_close(scaled / scale, unit, rtol=1e-14, atol=0)


def test_memory_stays_bounded_by_chunks_whatever_the_size(threads, monkeypatch):
    made = []

    class Counted(Buffers):
        def __init__(self, chunks, pairs):
            made.append(chunks * pairs)
            super().__init__(chunks, pairs)

    monkeypatch.setattr(noise_module, "Buffers", Counted)
    monkeypatch.setattr(noise_module, "_idle", [])
    threads(3)
    draw(size=2 * MILLION)
    draw(size=2 * MILLION)
    assert 1 <= len(made) <= 3
    assert max(made) <= 2**15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_narrow_tensors_are_refused(dtype):
    with pytest.raises(ValueError, match="float32 or float64"):
        draw(size=4, dtype=dtype)


class LooksLikeDTensor(torch.Tensor):
    def to_local(self):
        raise AssertionError


def test_distributed_tensors_are_refused():
    with pytest.raises(ValueError, match="local shard"):
        GaussianNoise(KEY).add_(
            torch.zeros(3).as_subclass(LooksLikeDTensor), stddev=1.0, step=0, name="w", offset=0
        )


@pytest.mark.parametrize("stddev", [-1.0, float("inf"), float("nan")])
def test_a_standard_deviation_out_of_range_is_refused(stddev):
    with pytest.raises(ValueError, match="stddev"):
        draw(size=4, stddev=stddev)


@pytest.mark.parametrize(("argument", "value"), [("offset", -1), ("step", -1), ("step", 0.5)])
def test_addresses_out_of_range_are_refused(argument, value):
    with pytest.raises(ValueError, match=argument):
        draw(size=4, **{argument: value})


@pytest.mark.parametrize("make", SOURCES)
@pytest.mark.parametrize(
    "key",
    [b"", b"short", bytes(31), bytes(33), bytes(32), b"k" * 32, b"secret" * 5 + b"ab", 7, "x" * 32],
)
def test_pitfall_51_weak_keys_are_refused(make, key):
    with pytest.raises(ValueError, match="key"):
        make(key)


def test_pitfall_51_new_keys_come_from_the_operating_system_and_are_accepted(monkeypatch):
    keys = {new_key() for _ in range(50)}
    assert len(keys) == 50
    assert all(GaussianNoise(key) for key in keys)
    monkeypatch.setattr("os.urandom", lambda n: bytes(range(n)))
    assert new_key() == bytes(range(32))


def test_pitfall_51_the_default_stream_is_cryptographic_and_each_stream_has_its_name():
    assert GaussianNoise(KEY).stream_name == "aes-256-ctr"
    assert PhiloxNoise(KEY).stream_name == "philox-4x64-10"


@pytest.mark.parametrize("make", SOURCES)
def test_pitfall_51_a_key_is_never_shown_copied_or_saved(make):
    source = make(KEY)
    assert str(list(KEY)) not in repr(source)
    assert KEY.hex() not in repr(source)
    assert repr(KEY) not in repr(source)
    for leak in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="secret key"):
            leak(source)


def test_pitfall_43_a_later_step_never_repeats_the_noise_of_an_earlier_one():
    first = {tuple(draw(size=4, step=step).tolist()) for step in range(500)}
    assert len(first) == 500


@settings(max_examples=50, deadline=None)
@given(
    a=st.tuples(st.text(max_size=8), st.integers(0, 2**63 - 1), st.text(max_size=8)),
    b=st.tuples(st.text(max_size=8), st.integers(0, 2**63 - 1), st.text(max_size=8)),
)
def test_different_addresses_have_different_subkeys(a, b):
    assert (derive(KEY, *a) == derive(KEY, *b)) == (a == b)
