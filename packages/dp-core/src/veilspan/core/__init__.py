"""Per-sample clipping for differentially private training: norms, clipped sums, noise, the step."""

from veilspan.core.adaptive import PrivateQuantile
from veilspan.core.clipping import Automatic, Clip
from veilspan.core.errors import PrivacyError, UnsupportedModelError
from veilspan.core.groups import ByPattern, Flat, PerBlock, PerLayer, PerParameter
from veilspan.core.noise import GaussianNoise, PhiloxNoise, new_key
from veilspan.core.release import Release
from veilspan.core.rules import RecordsAlone, register_rule
from veilspan.core.sampling import Draw, fixed_size_batches, poisson_batches
from veilspan.core.sketch import NormLaw, Sketch
from veilspan.core.step import PrivateStep

__all__ = [
    "Automatic",
    "ByPattern",
    "Clip",
    "Draw",
    "Flat",
    "GaussianNoise",
    "NormLaw",
    "PerBlock",
    "PerLayer",
    "PerParameter",
    "PhiloxNoise",
    "PrivacyError",
    "PrivateQuantile",
    "PrivateStep",
    "RecordsAlone",
    "Release",
    "Sketch",
    "UnsupportedModelError",
    "fixed_size_batches",
    "new_key",
    "poisson_batches",
    "register_rule",
]
