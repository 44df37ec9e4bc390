"""The cost model: seconds and bytes of norm methods, backward strategies, micro-batch sizes.

It counts what a strategy costs *beyond* an ordinary backward pass of the same micro-batch. B
records, T tokens, I and O input and output features, P trainable elements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from veilspan.core.gram import gram_tile
from veilspan.core.norms import ADDED_IN_PLACE
from veilspan.core.rates import DeviceRates

_FP32 = 4.0  # bytes
_LAYER_CALLS = 400.0
"""A linear map, forward and backward with what runs beside it, in calls on almost nothing."""
_SPARSE, _LARGE_TABLE = 8, 1 << 20
"""Rows per token, and elements, from which a sample's distinct rows are found."""
_TABLE_CALLS = 200.0
"""Norm and sum of one sample's rows of a table, in calls on almost nothing."""
_NORMAL_FLOPS = 1500.0
"""Drawing one Gaussian number from a cryptographic stream, in operations of matrix products."""
_TELLING = 1.03
"""Forecasts of a step that are closer than this do not tell which is faster."""


NormCost = Callable[[int, int, int], float]
"""Seconds of the squared norm of one sample in a linear map with (tokens, inputs, outputs)."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What the cost model knows of a model.

    Args:
        linears: (inputs I, outputs O) of each linear map.
        parameters: Trainable elements P.
        largest: Elements of the largest layer.
        features: Σ(I + O) over the linear maps of the largest clipping group.
        layered: Whether every clipping group ends within a layer.
        gradient_bytes: Of one element of a gradient.
        tables: (rows, width) of each embedding table.
        frozen: Elements that are used but not trained.
        tied: Trainable elements that several modules use; their gradients are kept per record.
        alone: Elements of the largest module whose records run one at a time.
        alone_in_group: Elements of such modules within one clipping group, at most.
        estimated: Whether norms are estimated, which spares forming gradients.
    """

    linears: tuple[tuple[int, int], ...]
    parameters: int
    largest: int
    features: int
    layered: bool
    gradient_bytes: float = _FP32
    tables: tuple[tuple[int, int], ...] = ()
    frozen: int = 0
    tied: int = 0
    alone: int = 0
    alone_in_group: int = 0
    estimated: bool = False


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What one strategy would cost beyond an ordinary backward pass.

    Args:
        name: The strategy.
        seconds: Time for the micro-batch.
        bytes: Memory.
    """

    name: str
    seconds: float
    bytes: float

    def __str__(self) -> str:
        """Return one line of a table."""
        return f"{self.name:<12} {self.seconds * 1e3:+9.1f} ms  +{self.bytes / 2**20:8.0f} MiB"


def norm_seconds(
    method: str, shape: tuple[int, int, int], rates: DeviceRates, *, probes: int = 0
) -> float:
    """Return the forecast time of one sample's squared norm, seconds.

    Args:
        method: `direct`, `gram` or `sketch`.
        shape: Tokens T, input features I, output features O of the linear map.
        rates: The device.
        probes: Gaussian probes of a sketch.
    """
    length, inputs, outputs = shape
    if method == "sketch":
        products = 2.0 * length * probes * (inputs + outputs) / rates.norm_flops
        drawn = probes * inputs * _NORMAL_FLOPS / rates.norm_flops
        return products + drawn + _FP32 * probes * (inputs + outputs) / rates.bandwidth
    if method == "direct":
        product = 2.0 * length * inputs * outputs / rates.norm_flops
        return product + _FP32 * inputs * outputs / rates.bandwidth
    pairs = length * (length + min(gram_tile(length), length)) / 2  # on the diagonal and below
    products = 2.0 * pairs * (inputs + outputs) / rates.norm_flops
    return products + 12.0 * pairs / rates.bandwidth


def keeping_pays(
    shape: tuple[int, int, int], rates: DeviceRates, gradient_bytes: float = _FP32
) -> bool:
    """Return whether a linear map's factors, with its norm by Gram, beat a gradient per sample.

    Args:
        shape: Tokens T, input features I, output features O of the linear map.
        rates: The device.
        gradient_bytes: Of one element of a gradient.
    """
    length, inputs, outputs = shape
    formed = _stored_seconds(inputs * outputs, rates, gradient_bytes)
    kept = norm_seconds("gram", shape, rates) + _factor_seconds(shape, rates)
    return kept < formed and length * (inputs + outputs) < inputs * outputs


def table_pays(length: int, rows: int, width: int) -> bool:
    """Return whether finding a sample's distinct rows beats a table of its own.

    Args:
        length: Tokens T.
        rows: Rows of the table.
        width: Its columns.
    """
    return _SPARSE * length <= rows and rows * width >= _LARGE_TABLE


def _stored_seconds(elements: int, rates: DeviceRates, gradient_bytes: float) -> float:
    """Return the time of a gradient that is kept, measured, and added to the sum."""
    moved = (rates.store_passes * gradient_bytes + 2.0 * _FP32) / rates.bandwidth
    return elements * (moved + 2.0 * gradient_bytes / rates.reading)


def _factor_seconds(shape: tuple[int, int, int], rates: DeviceRates) -> float:
    """Return the time to weigh a sample's factors, and to multiply them more slowly or faster.

    Their product takes the place of the one that an ordinary backward pass forms.
    """
    length, inputs, outputs = shape
    weighing = 3.0 * _FP32 * length * (inputs + outputs) / rates.bandwidth
    return weighing + 2.0 * length * inputs * outputs * (1 / rates.norm_flops - 1 / rates.flops)


def cheaper_norm(shape: tuple[int, int, int], rates: DeviceRates, *, probes: int = 0) -> str:
    """Return the norm method with the smallest forecast.

    Args:
        shape: Tokens T, input features I, output features O of the linear map.
        rates: The device.
        probes: Gaussian probes, where `sketch` may be used as well as `direct` and `gram`.
    """
    methods = ("direct", "gram", "sketch") if 0 < probes < min(shape[1:]) else ("direct", "gram")
    return min(methods, key=lambda method: norm_seconds(method, shape, rates, probes=probes))


def norm_cost(norms: str, rates: DeviceRates, *, probes: int = 0) -> NormCost:
    """Return the forecast time of a sample's squared norm as a function of (T, I, O), seconds.

    Args:
        norms: `direct`, `gram`, or `auto` for the cheapest.
        rates: The device.
        probes: Gaussian probes, where norms may be estimated.
    """

    def seconds(length: int, inputs: int, outputs: int) -> float:
        shape = (length, inputs, outputs)
        method = cheaper_norm(shape, rates, probes=probes) if norms == "auto" else norms
        return norm_seconds(method, shape, rates, probes=probes)

    return seconds


def forecast_all(
    size: int,
    length: int,
    model: ModelShape,
    rates: DeviceRates,
    norm_cost: NormCost,
) -> list[Forecast]:
    """Return what each strategy costs for `size` records of `length` tokens, the fastest first.

    Args:
        size: Records B of the micro-batch.
        length: Tokens T of each record held here.
        model: The model.
        rates: The device.
        norm_cost: Seconds of one norm.
    """
    products = sum(2.0 * size * length * i * o for i, o in model.linears) / rates.flops
    norms = sum(size * norm_cost(length, i, o) for i, o in model.linears)
    weighed = norms + sum(size * _factor_seconds((length, i, o), rates) for i, o in model.linears)
    weighed += _weighing_seconds(len(model.linears), length, model.parameters, rates)
    whole_seconds = _stored_seconds(model.parameters, rates, model.gradient_bytes)
    stored, gradient = size * whole_seconds, size * model.gradient_bytes * model.parameters
    kept = "single_sample"
    if size > 1:
        kept = "per_sample"
        stored, gradient = _stored(size, length, model, rates)
    # Whole gradients per record, which no strategy but single_sample does without.
    whole = size * model.gradient_bytes
    book = _FP32 * size * length * model.features + whole * (model.tied + model.alone_in_group)
    least = whole * (model.tied + model.alone)
    found = [
        Forecast(name="bookkeeping", seconds=weighed, bytes=book),
        # A second pass through everything: input gradients again, and what lies between layers.
        Forecast(name="two_pass", seconds=weighed + 1.3 * products, bytes=least),
    ]
    if not model.estimated:
        found.append(Forecast(name=kept, seconds=stored, bytes=gradient))
    if model.layered and not model.estimated:
        layer = _FP32 * model.largest + least
        seconds = 0.9 * size * whole_seconds
        found.append(Forecast(name="per_layer", seconds=seconds, bytes=layer))
    # To the nanosecond: where per_sample keeps every factor it is bookkeeping, which comes first.
    return sorted(found, key=lambda forecast: round(forecast.seconds, 9))


def _stored(size: int, length: int, model: ModelShape, rates: DeviceRates) -> tuple[float, float]:
    """Return seconds and bytes of keeping, layer by layer, gradients or factors."""
    each, once, held = 0.0, 0.0, 0.0
    rest = model.parameters
    for inputs, outputs in model.linears:
        shape = (length, inputs, outputs)
        if keeping_pays(shape, rates, model.gradient_bytes):
            rest -= inputs * outputs
            each += norm_seconds("gram", shape, rates) + _factor_seconds(shape, rates)
            once += _weighing_seconds(1, length, inputs * outputs, rates)
            held += _FP32 * length * (inputs + outputs)
    for rows, width in model.tables:
        if table_pays(length, rows, width):
            rest -= rows * width
            each += _TABLE_CALLS * rates.call_seconds
            held += _FP32 * length * width
    each += _stored_seconds(rest, rates, model.gradient_bytes)
    return size * each + once, size * (held + model.gradient_bytes * rest)


def _weighing_seconds(layers: int, length: int, elements: int, rates: DeviceRates) -> float:
    """Return what adding weighed products takes, however many records there are."""
    passes = 2.0 if length <= ADDED_IN_PLACE else 3.0
    return 20.0 * layers * rates.call_seconds + passes * _FP32 * elements / rates.bandwidth


def ordinary_seconds(size: int, length: int, model: ModelShape, rates: DeviceRates) -> float:
    """Return the forecast time of a micro-batch without privacy: its products alone.

    Args:
        size: Records B of the micro-batch.
        length: Tokens T of each record held here.
        model: The model.
        rates: The device.
    """
    elements = model.frozen + sum(i * o for i, o in model.linears)
    return 6.0 * size * length * elements / rates.flops


def best_microbatch(
    length: int,
    most: int,
    model: ModelShape,
    rates: DeviceRates,
    norm_cost: NormCost,
) -> int:
    """Return the smallest micro-batch, in records, that takes about the least time per record.

    Weights are read, and operations are started, once per micro-batch whatever its size; short
    sequences share that. Where sharing gains nothing that the model can tell, activations of fewer
    records stay closer to the processor. Powers of two are tried.

    Args:
        length: Tokens T of each record.
        most: Largest micro-batch allowed.
        model: The model.
        rates: The device.
        norm_cost: Seconds of one norm.
    """

    def seconds_per_record(size: int) -> float:
        fits = [
            forecast
            for forecast in forecast_all(size, length, model, rates, norm_cost)
            if forecast.bytes <= rates.free_bytes
        ]
        if not fits:
            return float("inf")
        shared = rates.weight_passes * _FP32 * (model.parameters + model.frozen) / rates.bandwidth
        shared += _LAYER_CALLS * len(model.linears) * rates.call_seconds
        return ordinary + (fits[0].seconds + shared) / size

    ordinary = ordinary_seconds(1, length, model, rates)
    seconds = {2**k: seconds_per_record(2**k) for k in range(max(1, most).bit_length())}
    most_allowed = _TELLING * min(seconds.values())
    return next((size for size, each in seconds.items() if each <= most_allowed), 1)
