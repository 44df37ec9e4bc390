"""Two normals from a radius word and an angle word, the same bits in NumPy and inside kernels.

Box and Muller (1958), https://doi.org/10.1214/aoms/1177706645: √(-2 ln u) · (cos θ, sin θ). All is
written out in additions, products and one square root, each of which IEEE 754 defines to the last
bit; nothing is left to a mathematical library. Coefficients: S. Moshier, Cephes (1992).
"""

from __future__ import annotations

from typing import no_type_check

import numpy as np
from numpy.typing import NDArray

from veilspan.kernels.compat import jit, tl

REFINED_BELOW = 256
"""A radius word below this is the upper half of 64 bits, which continue the tail to 9.49."""


def _log_series(t):
    """Return log(1 + t) - t for t in [√½ - 1, √2 - 1]; coefficients of Cephes."""
    series = 7.0376836292e-2 * t - 1.1514610310e-1
    series = series * t + 1.1676998740e-1
    series = series * t - 1.2420140846e-1
    series = series * t + 1.4249322787e-1
    series = series * t - 1.6668057665e-1
    series = series * t + 2.0000714765e-1
    series = series * t - 2.4999993993e-1
    series = series * t + 3.3333331174e-1
    square = t * t
    return series * t * square - 0.5 * square


def _sine(x):
    """Return sin x for |x| <= π/4; coefficients of Cephes."""
    square = x * x
    series = (-1.9515295891e-4 * square + 8.3321608736e-3) * square - 1.6666654611e-1
    return series * square * x + x


def _cosine(x):
    """Return cos x for |x| <= π/4; coefficients of Cephes."""
    square = x * x
    series = (2.443315711809948e-5 * square - 1.388731625493765e-3) * square + 4.166664568298827e-2
    return series * square * square - 0.5 * square + 1.0


_log_series_kernel, _sine_kernel, _cosine_kernel = jit(_log_series), jit(_sine), jit(_cosine)


@jit
@no_type_check
def normals_kernel(radius, more, angle, REFINED: tl.constexpr):
    """Return two normals from a radius word, 32 bits more of it where it is small, and an angle."""
    uniform = (radius.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    if REFINED:
        long = (radius.to(tl.float32) * 4294967296.0 + (more.to(tl.float32) + 0.5)) * (
            5.421010862427522e-20
        )
        uniform = tl.where(radius < 256, long, uniform)
    bits = uniform.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # so that the mantissa lies in [√½, √2)
    mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    # Near 1 the complement of the word gives 1 - u with full relative precision.
    short = (0xFFFFFFFF - radius).to(tl.float32) + 0.5
    t = tl.where(exponent == 0, short * -2.3283064365386963e-10, mantissa - 1.0)
    power = exponent.to(tl.float32)
    logarithm = (_log_series_kernel(t) - 2.12194440e-4 * power) + t + 0.693359375 * power
    length = tl.sqrt_rn(logarithm * -2.0)
    quadrant = (angle + 0x20000000) >> 30
    rest = (angle - (quadrant << 30)).to(tl.int32, bitcast=True)
    x = (rest.to(tl.float32) + 0.5) * 1.4629180792671596e-9
    sine = _sine_kernel(x) * length
    cosine = _cosine_kernel(x) * length
    turned = (quadrant & 1) == 1
    first = tl.where(turned, sine, cosine)
    second = tl.where(turned, cosine, sine)
    first = tl.where(((quadrant + 1) & 2) == 2, -first, first)
    second = tl.where((quadrant & 2) == 2, -second, second)
    return first, second


def normals(
    radius: NDArray[np.uint32], more: NDArray[np.uint32], angle: NDArray[np.uint32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return what `normals_kernel` returns, to the bit."""
    f32, u32 = np.float32, np.uint32
    uniform = (radius.astype(f32) + f32(0.5)) * f32(2.0**-32)
    long = (radius.astype(f32) * f32(2.0**32) + (more.astype(f32) + f32(0.5))) * f32(2.0**-64)
    bits = np.where(radius < REFINED_BELOW, long, uniform).view(np.int32)
    exponent = (bits - np.int32(0x3F3504F3)) >> np.int32(23)
    mantissa = (bits - (exponent << np.int32(23))).view(f32)
    short = (~radius).astype(f32) + f32(0.5)
    t = np.where(exponent == 0, short * f32(-(2.0**-32)), mantissa - f32(1.0))
    power = exponent.astype(f32)
    logarithm = (_log_series(t) - f32(2.12194440e-4) * power) + t + f32(0.693359375) * power
    length = np.sqrt(logarithm * f32(-2.0))
    quadrant = (angle + u32(0x20000000)) >> u32(30)
    rest = (angle - (quadrant << u32(30))).view(np.int32)
    x = (rest.astype(f32) + f32(0.5)) * f32(1.4629180792671596e-9)
    sine, cosine = _sine(x) * length, _cosine(x) * length
    turned = (quadrant & u32(1)) == 1
    first, second = np.where(turned, sine, cosine), np.where(turned, cosine, sine)
    first = np.where(((quadrant + u32(1)) & u32(2)) == 2, -first, first)
    return first, np.where((quadrant & u32(2)) == 2, -second, second)
