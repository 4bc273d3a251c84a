"""Predictions of a recipe, from its network or from the ONNX file it ended in, and the gate on them.

Only `recipe_layers` imports torch; a file's layers are kept as facts of its export, so that a report needs neither
torch nor onnx.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path

from sparsify_deploy.errors import CheckFailed, ModelError
from sparsify_deploy.prediction import advice
from sparsify_deploy.prediction.gpus import Gpu, chosen, of_device
from sparsify_deploy.prediction.measured import weigh
from sparsify_deploy.prediction.roofline import LABEL, GpuForecast, Layer, forecast
from sparsify_deploy.recipe import Recipe
from sparsify_deploy.reports import BenchmarkReport, Gate, Prediction, from_json
from sparsify_deploy.types import Json
from sparsify_deploy.verdict import SPARSE_KERNELS


def file_layers(path: Path, *, quantized: bool) -> list[Json]:
    """The layers of an exported file as JSON: INT8 and 2:4 where its final values are.

    Where the recipe does not quantise, every layer with a weight is taken as INT8.
    """
    from sparsify_deploy.graph import eligibility, file, layers, shapes
    from sparsify_deploy.graph.nm import violations

    model = file.load(path)
    weighted = {layer.weight: layer for layer in layers.weight_layers(model)}
    found = []
    for work in shapes.workloads(model):
        layer = weighted.get(work.parameter)
        if layer is None:
            found.append(Layer(work, False, False, "no weight"))
            continue
        int8 = (layer.precision == "INT8" and layer.int8_in) or not quantized
        possible = eligibility.pattern_possible(layer.shape, layer.groups, 4)
        held = possible.ok and violations(layer.values, 2, 4) == 0
        reason = possible.reason if not possible.ok else "holds 2:4" if held else "does not hold 2:4"
        found.append(Layer(work, int8, int8 and held, reason if int8 else "not INT8 in the file"))
    return [asdict(layer) for layer in found]


def predictable(path: Path, *, quantized: bool) -> dict[str, Json]:
    """The facts of an export that predictions rest on: its `workloads`, or why they are `not_predicted`."""
    try:
        return {"workloads": file_layers(path, quantized=quantized)}
    except ModelError as error:  # a file without known shapes is no worse a file
        return {"not_predicted": str(error)}


def restored(facts: Mapping[str, Json]) -> tuple[Layer, ...] | None:
    """The layers that an export's facts hold; None where there are none."""
    found: tuple[Layer, ...] | None = from_json(tuple[Layer, ...], facts["workloads"]) if "workloads" in facts else None
    return found


def forecasts(layers: Sequence[Layer], gpus: Sequence[Gpu], batch_sizes: Sequence[int]) -> tuple[GpuForecast, ...]:
    """One prediction a GPU and batch size."""
    return tuple(forecast(layers, gpu, size) for gpu in gpus for size in batch_sizes)


def warnings(recipe: Recipe, layers: Sequence[Layer], found: Sequence[GpuForecast]) -> tuple[str, ...]:
    """What `plan` warns of, see `prediction.advice`."""
    init = recipe.init
    densities: dict[str, float] = {}
    if init is not None and recipe.sparsity is not None and init.allocation == "erk":
        from sparsify_deploy.sparsity.allocation import erk

        masked = [
            layer
            for layer in layers
            if layer.work.shape and not any(fnmatchcase(layer.work.name, pattern) for pattern in init.keep_dense)
        ]
        dense = erk({layer.work.name: layer.work.shape for layer in masked}, 1 - recipe.sparsity)
        densities = {layer.work.name: dense[layer.work.name] for layer in masked if layer.sparse}
    allocation = init.allocation if init is not None else None
    return (
        *advice.section_lines(projected=recipe.nm is not None, quantized=recipe.quantize is not None),
        *advice.sparsity_lines(recipe.sparsity, allocation, densities, projected=recipe.nm is not None),
        *advice.shape_lines(layers),
        *advice.batch_lines(found),
    )


def unskipped(recipe: Recipe) -> tuple[str, ...]:
    """A line for each runtime of the recipe that has no kernels for 2:4, or does not tell."""
    lines = {
        False: "2:4 gains exactly 1.00x over dense INT8: it has no kernels that skip zeros (stated, not measured)",
        None: "does not tell which kernels skip zeros, so nothing is predicted for it",
    }
    found = [(target.runtime, SPARSE_KERNELS.get(target.runtime, True)) for target in recipe.deploy]
    return tuple(f"{runtime}: {lines[sparse]}" for runtime, sparse in found if sparse in lines)


def gate(recipe: Recipe, layers: Sequence[Layer]) -> Gate | None:
    """`gates.min_predicted_speedup` beside the ideal estimate: first GPU, largest batch size from 32 on."""
    limit = recipe.gates.min_predicted_speedup
    if limit is None:
        return None
    found = _decisive(recipe, layers)
    value = found.gain("ideal")
    how = f"2:4 over dense INT8 on {found.gpu} at batch {found.batch_size}, ideal, {LABEL}"
    return Gate("min_predicted_speedup", limit, value, value >= limit, how)


def check_gate(recipe: Recipe, layers: Sequence[Layer]) -> None:
    """`CheckFailed` where the gate is not met: what was predicted, which layers limit it, what to do."""
    result = gate(recipe, layers)
    if result is None or result.met:
        return
    found = _decisive(recipe, layers)
    raise CheckFailed(
        f"gates.min_predicted_speedup: predicted {result.value:.3f}x < {result.limit:g}x ({result.how}; realistic "
        f"{found.gain('realistic'):.3f}x); limited by {advice.limits(found)}; nothing was run: ship dense INT8 (no nm "
        "section), change what limits it, name another GPU or a larger batch under prediction, or lower the gate"
    )


def _decisive(recipe: Recipe, layers: Sequence[Layer]) -> GpuForecast:
    settings = recipe.prediction
    return forecast(layers, chosen(settings.gpus)[0], max(settings.batch_sizes))


def rows(
    recipe: Recipe,
    layers: Sequence[Layer],
    benchmarks: Sequence[BenchmarkReport],
    device: str,
    labels: tuple[str, str],
    *,
    nodes: Mapping[str, str] | None = None,
) -> tuple[Prediction, ...]:
    """Predicted beside measured; `labels` are those of the sparse model and its twin, `device` this GPU's name.

    `nodes` names the ONNX node of each weight: with it the first runtime's profile of the twin, if it has sparse
    kernels, makes a row of its own.
    """
    here = of_device(device)
    settings = recipe.prediction
    predicted = [
        Prediction(
            target=found.gpu,
            batch_size=found.batch_size,
            eligible=found.eligible,
            weighted=found.weighted,
            share=found.share,
            realistic=found.gain("realistic"),
            ideal=found.gain("ideal"),
            realistic_over_fp16=found.gain("realistic", "fp16"),
            ideal_over_fp16=found.gain("ideal", "fp16"),
            how=LABEL,
            measured=_measured([b for b in benchmarks if SPARSE_KERNELS.get(b.runtime)], found.batch_size, labels)
            if here is not None and here.name == found.gpu
            else None,
        )
        for found in forecasts(layers, chosen(settings.gpus), settings.batch_sizes)
    ]
    stated = [
        Prediction(
            target=f"this CPU, {benchmark.runtime}",
            batch_size=race.batch_size,
            realistic=1.0,
            ideal=1.0,
            how=f"stated: {benchmark.runtime} has no kernels that skip zeros",
            measured=_measured([benchmark], race.batch_size, labels),
        )
        for benchmark in benchmarks
        if SPARSE_KERNELS.get(benchmark.runtime, True) is False
        for race in benchmark.races
    ]
    return (
        *predicted,
        *(_weighed(layers, benchmarks[0], device, labels, nodes) if nodes and benchmarks else ()),
        *stated,
    )


def _weighed(
    layers: Sequence[Layer],
    benchmark: BenchmarkReport,
    device: str,
    labels: tuple[str, str],
    nodes: Mapping[str, str],
) -> list[Prediction]:
    """The prediction from the measured times of the dense twin's layers, at the batch size it was profiled at."""
    profile = benchmark.profiles.get(labels[1])
    sparse = [layer for layer in layers if layer.sparse]
    if profile is None or not benchmark.races or not SPARSE_KERNELS.get(benchmark.runtime):
        return []
    result = weigh(profile, [nodes.get(layer.work.parameter, layer.work.name) for layer in sparse])
    if result is None:
        return []
    size = benchmark.races[0].batch_size
    return [
        Prediction(
            target=device,
            batch_size=size,
            eligible=len(sparse),
            weighted=sum(bool(layer.work.shape) for layer in layers),
            share=result.share,
            realistic=result.realistic,
            ideal=result.ideal,
            how=f"from the measured dense engine on {device}: its layers' shares, of {profile.runs} profiled runs",
            measured=_measured([benchmark], size, labels),
        )
    ]


def _measured(
    benchmarks: Sequence[BenchmarkReport], batch_size: int, labels: tuple[str, str]
) -> tuple[float, float, float] | None:
    """Median and 95 % interval of the sparse model over its twin, in the first race at that batch size."""
    for benchmark in benchmarks:
        for race in benchmark.races:
            if race.batch_size == batch_size and {*labels} <= {*race.labels}:
                found = race.compare(*labels)
                return found.median, found.low, found.high
    return None
