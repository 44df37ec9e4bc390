"""Privacy section of a recipe, together with the number of units, turned into a plan."""

from __future__ import annotations

from veilspan.accounting import PrivacyPlan, SketchedClip
from veilspan.trainer.errors import RecipeError, TrainerError
from veilspan.trainer.recipe import Recipe
from veilspan.trainer.sections import Privacy

_STREAMS = {"aes": "aes-ctr", "chacha20": "chacha20", "philox": "philox"}
_GENERATORS = {"aes-256-ctr": "aes", "chacha20": "chacha20", "philox": "philox"}


def privacy_plan(recipe: Recipe, num_units: int) -> PrivacyPlan:
    """Return the plan that sampler, noise, ledger and statement of a run are built from.

    Args:
        recipe: The recipe.
        num_units: Number N of protected units, treated as public.

    Raises:
        RecipeError: If the numbers contradict each other or the target cannot be reached.

    Guarantee:
        Sampling probability and expected batch size are functions of the recipe and N alone,
        never of a batch that was drawn.
    """
    law, privacy, data = None, recipe.privacy, recipe.data
    if privacy.norm_probes is not None:
        law = SketchedClip(probes=privacy.norm_probes, blocks=privacy.norm_blocks)
    each = data.sequences_per_unit
    return plan_of(privacy, num_units, unit=data.unit, records_per_unit=each, norms=law)


def plan_of(
    privacy: Privacy,
    num_units: int,
    *,
    unit: str,
    records_per_unit: int = 1,
    num_records: int | None = None,
    norms: SketchedClip | None,
) -> PrivacyPlan:
    """Return the plan of a privacy section alone; errors and guarantee as in `privacy_plan`.

    Args:
        privacy: The section.
        num_units: Number N of protected units, or more than that, treated as public.
        unit: What one of them is, in the singular.
        records_per_unit: The most records that one of them holds, each drawn by itself.
        num_records: Number of records; by default each unit holds the most.
        norms: The law of estimated norms; None where they are exact.
    """
    num_records = num_units * records_per_unit if num_records is None else num_records
    drawn = "units" if records_per_unit == 1 else "records of units"
    delta = _delta(privacy, num_units)
    probability = _sampling_probability(privacy, num_records, drawn)
    settings = {
        "delta": delta,
        "sampling_probability": probability,
        "steps": privacy.steps,
        "clip_norm": privacy.clip_norm,
        "expected_batch_size": probability * num_records,
        "unit": unit,
        "records_per_unit": records_per_unit,
        "noise_stream": _STREAMS[privacy.noise],
        "norms": norms,
    }
    if norms is not None and probability == 1:
        raise RecipeError(
            "The sampling probability is 1, for which estimated norms have no certified ε. Draw "
            "smaller batches, or use exact norms (no privacy.norm_probes)."
        )
    if privacy.noise_multiplier is not None:
        return PrivacyPlan(noise_multiplier=privacy.noise_multiplier, **settings)
    assert privacy.target_epsilon is not None  # Privacy refuses neither of the two
    try:
        return PrivacyPlan.calibrate(target_epsilon=privacy.target_epsilon, **settings)
    except ValueError as error:
        raise RecipeError(
            f"No noise fits privacy.target_epsilon = {privacy.target_epsilon:g}: {error}"
        ) from error


def noise_named(noise: object) -> str:
    """Return what a recipe calls the noise that this source draws; AES where there is none.

    Raises:
        TrainerError: If it is no noise that a privacy statement knows.
    """
    if noise is None:
        return "aes"
    stream = str(getattr(noise, "stream_name", None))
    for beginning, name in _GENERATORS.items():
        if stream.startswith(beginning) and hasattr(noise, "add_"):
            return name
    raise TrainerError(
        f"noise is {noise!r}, whose stream_name is {stream!r}; privacy statements know "
        f"{', '.join(_GENERATORS)}. Pass GaussianNoise, PhiloxNoise or TritonNoise."
    )


def _sampling_probability(privacy: Privacy, num_records: int, drawn: str) -> float:
    if privacy.sampling_probability is not None:
        return privacy.sampling_probability
    assert privacy.expected_batch_size is not None  # Privacy refuses neither of the two
    if privacy.expected_batch_size > num_records:
        raise RecipeError(
            f"privacy.expected_batch_size is {privacy.expected_batch_size:g}, but there are only "
            f"{num_records} {drawn}; set it to at most {num_records}."
        )
    return privacy.expected_batch_size / num_records


def _delta(privacy: Privacy, num_units: int) -> float:
    if num_units < 2:
        few = "only 1 unit" if num_units else "no unit"
        raise RecipeError(
            f"There is {few} to train on, so nothing can hide among others; "
            "train on more, or split data.train into the units that are to be protected."
        )
    if isinstance(privacy.delta, str):
        return num_units**-1.1
    if privacy.delta >= 1 / num_units:
        raise RecipeError(
            f"privacy.delta is {privacy.delta:g}, but it must be below 1/N = "
            f"{1 / num_units:.3g} for N = {num_units} units: above that, publishing whole "
            'units at random would count as private. Set it lower, or to "auto".'
        )
    return privacy.delta
