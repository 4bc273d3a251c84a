"""The sparsity verdict of single layers: from the final values in the file to the kernel that ran.

The file tells the pattern, the shape rule and INT8 in and out; the builder tells what was eligible and what it picked;
the runtime's profiler tells times. Where one of them cannot tell, the answer is None and the row says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sparsify_deploy.graph import eligibility
from sparsify_deploy.graph.engine_names import hides_nodes, nodes_in
from sparsify_deploy.reports import LayerChain, LayerReport, LayerVerdict
from sparsify_deploy.types import EngineProfile, Facts, LayerTime
from sparsify_deploy.verdict import SPARSE_KERNELS

if TYPE_CHECKING:
    from sparsify_deploy.graph.layers import WeightLayer

NAMES: Mapping[str, str] = {
    "openvino": "OpenVINO",
    "onnxruntime": "ONNX Runtime",
    "tensorrt": "TensorRT",
    "tensorrt_rtx": "TensorRT-RTX",
}
"""How texts call a runtime."""


def file_part(layers: Sequence[WeightLayer], n: int = 2, m: int = 4) -> tuple[LayerReport, ...]:
    """What the file alone tells of each layer, for N:M; a weight that several layers share counts once."""
    first = {layer.weight: layer for layer in reversed(layers)}
    return tuple(_file_row(layer, n, m) for layer in reversed(first.values()))


def _file_row(layer: WeightLayer, n: int, m: int) -> LayerReport:
    from sparsify_deploy.graph.nm import blocks, violations
    from sparsify_deploy.graph.size import bytes_as_stored, bytes_compressed

    unpruned = eligibility.UNPRUNED.get(layer.op, "")
    possible = eligibility.pattern_possible(layer.shape, layer.groups, m)
    if unpruned:
        possible = eligibility.Answer(False, unpruned)
    broken = 0 if unpruned else violations(layer.values, n, m)
    fits = not unpruned and eligibility.pattern_possible(layer.shape, layer.groups, 4).ok
    usable = fits and violations(layer.values, 2, 4) == 0
    return LayerReport(
        name=layer.name,
        weight=layer.weight,
        op=layer.op,
        shape=layer.shape,
        groups=layer.groups,
        precision=layer.precision,
        int8_in=layer.int8_in,
        int8_out=layer.int8_out,
        weights=int(layer.values.size),
        zeros=int((layer.values == 0).sum()),
        pattern_possible=possible.ok,
        pattern_held=possible.ok and broken == 0,
        usable=usable,
        rule_of_thumb=not unpruned and eligibility.rule_of_thumb(layer.shape, layer.groups, m).ok,
        reason=unpruned or eligibility.explained(layer.shape, layer.groups, m),
        bytes_stored=bytes_as_stored(layer.shape, layer.precision),
        bytes_compressed=bytes_compressed(layer.shape, layer.precision, usable),
        violations=broken,
        blocks=0 if unpruned else blocks(layer.values, m),
        float_reader=layer.float_reader,
        output=layer.output,
    )


def times_of(layer: str, profile: EngineProfile | None, output: str = "") -> tuple[LayerTime, ...]:
    """The engine's layers that hold the ONNX node `layer`, by the nodes the runtime names or by their own name.

    Where none does: those that name the tensor `output` that the node makes, as OpenVINO does for an output of the
    network.
    """
    found = profile.layers if profile is not None else ()
    by_node = tuple(time for time in found if layer in time.nodes or layer in nodes_in(time.name))
    return by_node or tuple(time for time in found if output and output in time.nodes)


@dataclass(frozen=True)
class Known:
    """What is known of an engine besides its file; all of it may be missing, the runtime too.

    `facts` are the build's: `sparse_eligible` and `sparse_picked` list engine layers, None where the builder said
    nothing. `dense` and `sparse` are profiles of the dense twin's engine and of this one, at `batch_size`.
    `projectable` names the weights that a projection takes; None: by their names alone, as torch's modules have them.
    """

    pattern: str = "2:4"
    runtime: str = ""
    facts: Facts = field(default_factory=dict)
    dense: EngineProfile | None = None
    sparse: EngineProfile | None = None
    batch_size: int | None = None
    projectable: frozenset[str] | None = None


def judge(layers: Sequence[LayerReport], known: Known) -> tuple[LayerVerdict, ...]:
    """One verdict a layer of `file_part`."""
    return tuple(_judged(layer, known) for layer in layers)


def chain(model: str, layers: Sequence[LayerReport], known: Known, twin: str = "") -> LayerChain:
    """`judge`, with what a table must say about how its numbers came about."""
    profiles = [profile for profile in (known.dense, known.sparse) if profile is not None]
    notes = list(dict.fromkeys(profile.note for profile in profiles if profile.note))
    if verdict := known.facts.get("sparse_verdict"):
        notes.append(verdict)
    timed = [profile for profile in profiles if profile.layers]
    return LayerChain(
        model=model,
        runtime=known.runtime,
        pattern=known.pattern,
        layers=judge(layers, known),
        twin=twin,
        batch_size=known.batch_size if timed else None,
        profiled_runs=timed[0].runs if timed else 0,
        notes=tuple(notes),
    )


def _judged(layer: LayerReport, known: Known) -> LayerVerdict:
    own = times_of(layer.name, known.sparse, layer.output)
    twin = times_of(layer.name, known.dense, layer.output)
    eligible, picked = _builder(layer.name, known, own)
    kernel = max(own, key=lambda time: time.ms).kernel if own else ""
    if picked:
        reason, advice = f"runs sparse{f': {kernel}' if kernel else ''}", ""
    elif (obstacle := next(_obstacles(layer, known), None)) is not None:
        reason, advice = obstacle
        if eligible and picked is False:
            reason = f"eligible, not picked: {reason}"
    else:
        reason, advice = _unobstructed(layer, known, eligible, picked)
    return LayerVerdict(
        layer=layer.name,
        weight=layer.weight,
        op=layer.op,
        shape=layer.shape,
        groups=layer.groups,
        precision=layer.precision,
        weights=layer.weights,
        zeros=layer.zeros,
        blocks=layer.blocks,
        violations=layer.violations,
        pattern_held=layer.pattern_held,
        shape_rule=layer.rule_of_thumb,
        int8_in=layer.int8_in,
        int8_out=layer.int8_out,
        eligible=eligible,
        picked=picked,
        kernel=kernel,
        dense_ms=sum(time.ms for time in twin) if twin else None,
        sparse_ms=sum(time.ms for time in own) if own else None,
        reason=reason,
        advice=advice,
    )


def _builder(layer: str, known: Known, own: Sequence[LayerTime]) -> tuple[bool | None, bool | None]:
    """Eligible and picked, by the builder's lists and the name of the tactic that ran."""
    if not known.runtime or "sparse_verdict" in known.facts:
        return None, None
    if SPARSE_KERNELS.get(known.runtime, True) is False:
        return None, False
    eligible = _listed(layer, known.facts.get("sparse_eligible"))
    picked = _listed(layer, known.facts.get("sparse_picked"))
    kernels = [time.kernel for time in own if time.kernel and not hides_nodes(time.kernel)]
    if any("sparse" in kernel.lower() for kernel in kernels):
        picked = True
    elif picked is None and kernels:
        picked = False
    return (True if picked else eligible), picked


def _listed(layer: str, names: Sequence[str] | None) -> bool | None:
    """Whether a builder's list holds the layer; None without a list, or where a name in it hides its nodes."""
    if names is None:
        return None
    if any(layer in nodes_in(name) for name in names):
        return True
    return None if any(hides_nodes(name) for name in names) else False


def _unobstructed(  # noqa: PLR0911 - one return a case
    layer: LayerReport, known: Known, eligible: bool | None, picked: bool | None
) -> tuple[str, str]:
    """Reason and advice for a layer whose file would do and that is not known to run sparse."""
    clear = "nothing in the file is against it"
    name = NAMES.get(known.runtime, known.runtime)
    if not known.runtime:
        return f"{clear}; what a builder picks is not known from the file", ""
    if "sparse_verdict" in known.facts:
        return f"{clear}; {name} does not tell which kernels are sparse", ""
    if SPARSE_KERNELS.get(known.runtime, True) is False:
        return f"{clear}; {name} has no sparse kernels: zeros make nothing faster here", ""
    if eligible and picked is False:
        bound = ""
        if known.batch_size is not None and known.batch_size <= 8 and all(axis == 1 for axis in layer.shape[2:]):
            what = "1x1" if len(layer.shape) > 2 else "a matrix product"
            bound = f" ({what} at batch {known.batch_size} is likely bound by bytes)"
        advice = "a larger batch or more channels may turn it; else dense weights cost nothing here"
        return f"eligible, not picked: the builder found no sparse kernel faster than the dense one{bound}", advice
    if eligible is False:
        return (
            f"not eligible by the builder's word, though {clear}",
            "look for it in the builder's log, beside the engine",
        )
    if picked is False:
        return f"a dense kernel ran, though {clear}; the builder did not tell why", ""
    return f"{clear}; {name} did not tell whether it picked a sparse kernel", ""


def _outside(layer: LayerReport, known: Known) -> str:
    """What to do about a weight that is no module's, so that neither projection nor quantisation finds it; else ""."""
    if known.projectable is not None:
        inside = layer.weight in known.projectable
        return "" if inside else "make it an nn.Linear or nn.Conv: a weight outside a module is not projected"
    if layer.weight == "weight" or layer.weight.endswith(".weight"):
        return ""
    return "project it if it is of an nn.Linear or nn.Conv: a weight outside a module is not projected"


def _obstacles(layer: LayerReport, known: Known) -> Iterator[tuple[str, str]]:
    """What stands against a sparse INT8 kernel by the file, in the order of the chain, each with advice."""
    pattern = known.pattern
    if layer.op in eligibility.UNPRUNED:
        yield layer.reason, "leave it: its weights stay as they are"
    m = int(pattern.partition(":")[2])
    outputs, inputs = layer.shape[0], layer.shape[1]
    possible = eligibility.pattern_possible(layer.shape, layer.groups, m)
    rule = eligibility.rule_of_thumb(layer.shape, layer.groups, m)
    wide = eligibility.next_multiple(inputs, 32)
    if layer.groups != 1:
        yield possible.reason, "leave it dense: no hardware skips the zeros of a grouped convolution"
    if not possible.ok:
        yield possible.reason, f"{wide} would hold {pattern}; a layer that reads the data itself is best left dense"
    if layer.violations:
        advice = "project it: nm.keep_dense and nm.keep_worst_dense leave layers out"
        if outside := _outside(layer, known):
            advice = outside
        elif not rule.ok:
            advice = f"the rule of thumb leaves it out ({rule.reason}): nm.layers pattern_possible takes it in"
        yield f"{layer.violations} of {layer.blocks} groups break {pattern}", advice
    if layer.precision != "INT8":
        advice = "quantise it: quantize.keep_float leaves layers out"
        yield f"weights are {layer.precision}, not INT8", _outside(layer, known) or advice
    if outputs % 8:
        yield rule.reason, f"{eligibility.next_multiple(outputs, 8)} may let INT8 kernels run sparse"
    if inputs % 32:
        yield f"C_in {inputs} is not a multiple of 32", f"{wide} may let INT8 kernels run sparse"
    if not layer.int8_in:
        yield "input is not quantised: it comes in FP16 or FP32", "put Q/DQ in front of it"
    if not layer.int8_out:
        yield _float_output(layer)


def _float_output(layer: LayerReport) -> tuple[str, str]:
    operator = layer.float_reader.partition(" ")[0]
    if operator == "the":
        return "output is not quantised: it is the output of the network", "leave it: nothing reads it in INT8"
    if operator == "Add":
        what = f"residual {layer.float_reader} reads FP16 or FP32"
        return (
            f"output is not quantised: {what}",
            "Q/DQ on the branches of the sum: quantize.residual, or quantize.stream where a LayerNorm reads it",
        )
    what = f"{layer.float_reader} reads FP16 or FP32" if layer.float_reader else "it is read in FP16 or FP32"
    return f"output is not quantised: {what}", "put Q/DQ behind it"
