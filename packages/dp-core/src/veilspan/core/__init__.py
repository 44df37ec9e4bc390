"""Per-sample clipping for differentially private training: norms, clipped sums, noise, the step."""

from veilspan.core.clipping import Automatic, Clip, Flat
from veilspan.core.errors import PrivacyError, UnsupportedModelError
from veilspan.core.noise import GaussianNoise, PhiloxNoise, new_key
from veilspan.core.sampling import Draw, poisson_batches
from veilspan.core.step import PrivateStep, Release

__all__ = [
    "Automatic",
    "Clip",
    "Draw",
    "Flat",
    "GaussianNoise",
    "PhiloxNoise",
    "PrivacyError",
    "PrivateStep",
    "Release",
    "UnsupportedModelError",
    "new_key",
    "poisson_batches",
]
