"""What the measurements say: the gates, and one honest sentence on what to ship."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sparsify_deploy.reports import BenchmarkReport, EngineRow, Gate, Row
from sparsify_deploy.timing import Comparison, Race

SPARSE_KERNELS = {"openvino": False, "onnxruntime": False, "tensorrt": True, "tensorrt_rtx": False}
"""Whether a runtime has kernels that skip 2:4 zeros and can be seen to pick them."""


@dataclass(frozen=True)
class Evidence:
    """What a verdict rests on. `dense_start` is the dense FP32 model, the others the final models of the branches."""

    metric: str
    direction: Literal["higher", "lower"]
    dense_start: Row | None
    dense: Row | None
    sparse: Row | None
    engines: tuple[EngineRow, ...]
    benchmarks: tuple[BenchmarkReport, ...]
    collapsed: tuple[str, ...] = ()

    @property
    def race(self) -> Race | None:
        """The race that decides: the recipe's first runtime at its first batch size."""
        return self.benchmarks[0].races[0] if self.benchmarks and self.benchmarks[0].races else None

    def value(self, row: Row, branch: str | None = None) -> float:
        """The metric of a final model on the first engine that ran here, else that of the torch model."""
        measured = [e.metrics for e in self.engines if e.branch == branch and e.metrics is not None]
        return measured[0][self.metric] if measured else row.model.metrics[self.metric]

    def drop(self, value: float) -> float | None:
        """How much worse than the dense FP32 model, in the metric's unit; negative where it is better."""
        if self.dense_start is None:
            return None
        before = self.dense_start.model.metrics[self.metric]
        return before - value if self.direction == "higher" else value - before


def gates(evidence: Evidence, limits: Mapping[str, float | None]) -> tuple[Gate, ...]:
    """Each limit of the recipe beside what was measured."""
    final = evidence.sparse or evidence.dense
    branch = "sparse" if evidence.sparse else "dense"
    found = []
    if (limit := limits.get("max_drop")) is not None:
        drop = evidence.drop(evidence.value(final, branch)) if final else None
        how = f"how much worse the final model's {evidence.metric} is than dense FP32's, on all test examples"
        found.append(Gate("max_drop", limit, drop, None if drop is None else drop <= limit, how))
    if (limit := limits.get("min_speedup")) is not None:
        ratio = twin(evidence)
        how = "median ratio to the dense twin, interleaved, first runtime and batch size"
        found.append(
            Gate(
                "min_speedup",
                limit,
                ratio.median if ratio else None,
                None if ratio is None else ratio.median >= limit,
                how,
            )
        )
    if (limit := limits.get("min_sparsity")) is not None:
        value = final.model.sparsity if final else None
        how = "zeros over weights of all layers in the final ONNX file"
        found.append(Gate("min_sparsity", limit, value, None if value is None else value >= limit, how))
    return tuple(found)


def twin(evidence: Evidence) -> Comparison | None:
    """The final sparse model against the final dense one."""
    if evidence.race is None or evidence.dense is None or evidence.sparse is None:
        return None
    return evidence.race.compare(evidence.sparse.label, evidence.dense.label)


def verdict(evidence: Evidence, max_drop: float | None) -> str:
    """One line that starts with `Verdict:`: what to ship, what each step bought here, and what was not measured."""
    if evidence.dense is None and evidence.sparse is None:
        return "Verdict: none, the run stopped before a final model."
    if evidence.race is None:
        parts = [f"none on latency: {_why_no_race(evidence)}", _accuracy(evidence), _collapse(evidence)]
        return "Verdict: " + "; ".join(part for part in parts if part) + "."
    parts = [
        _choice(evidence, max_drop),
        _int8(evidence),
        _sparse(evidence),
        _accuracy(evidence),
        _collapse(evidence),
    ]
    return "Verdict: " + "; ".join(part for part in parts if part) + "."


def _why_no_race(evidence: Evidence) -> str:
    if not evidence.benchmarks:
        return "the recipe deploys to no runtime, or the run stopped before the benchmark"
    return f"{evidence.benchmarks[0].runtime} cannot run here ({evidence.benchmarks[0].not_run})"


def _choice(evidence: Evidence, max_drop: float | None) -> str:
    """The simplest model that holds the accuracy gate and that no other acceptable one beats beyond the noise."""
    race = evidence.race
    assert race is not None
    if evidence.dense_start is None:
        return "no recommendation, for there is no dense twin to compare with (dense_branch is off)"
    chosen: str | None = None
    for row, branch in ((evidence.dense_start, None), (evidence.dense, "dense"), (evidence.sparse, "sparse")):
        if row is None or row.label not in race.labels:
            continue
        drop = evidence.drop(evidence.value(row, branch))
        if max_drop is not None and drop is not None and drop > max_drop:
            continue
        if chosen is None or (row.label != chosen and race.compare(row.label, chosen).claim == "faster"):
            chosen = row.label
    return f"ship the {chosen} model" if chosen else "no model holds the accuracy gate"


def _setting(evidence: Evidence) -> str:
    race = evidence.race
    assert race is not None
    return f"{evidence.benchmarks[0].runtime}, batch {race.batch_size}, {race.clock}"


def _int8(evidence: Evidence) -> str:
    final = evidence.dense or evidence.sparse
    start = evidence.dense_start
    race = evidence.race
    if race is None or final is None or start is None or start.label not in race.labels or final.label == start.label:
        return ""
    text = f"{final.label} against {start.label} is {times(race.compare(final.label, start.label))} here"
    others = "".join(
        f", {other.compare(final.label, start.label).median:.2f}x at batch {other.batch_size}"
        for other in evidence.benchmarks[0].races[1:]
    )
    return f"{text} ({_setting(evidence)}{others})"


def _sparse(evidence: Evidence) -> str:
    found = twin(evidence)
    if found is None or evidence.sparse is None:
        return ""
    held = sum(layer.usable for layer in evidence.sparse.model.layers)
    total = len(evidence.sparse.model.layers)
    runtime = evidence.benchmarks[0].runtime
    if found.claim == "faster":
        text = f"the sparse model against its dense twin is {times(found)}"
    else:
        why = "" if SPARSE_KERNELS[runtime] else f", {runtime} has no sparse kernels"
        text = f"sparsity adds no speed on this runtime ({times(found)}{why})"
    if not held:
        return text + f"; 0 of {total} layers hold 2:4, so no hardware can use it"
    return (
        text + f"; {held} of {total} layers hold 2:4, what that gains on an Ampere or Hopper GPU was not measured here"
    )


def times(found: Comparison) -> str:
    """`3.10x faster [3.02, 3.18]`, or that it is within the noise."""
    interval = f"[{found.low:.2f}, {found.high:.2f}]"
    if found.claim == "within the noise":
        return f"{found.median:.2f}x {interval}, within the noise"
    return f"{found.median:.2f}x {interval}, {found.claim}"


def _accuracy(evidence: Evidence) -> str:
    final = evidence.sparse or evidence.dense
    assert final is not None
    branch = "sparse" if evidence.sparse else "dense"
    parts = [f"{evidence.metric} {evidence.value(final, branch):.4f} {final.label}"]
    if evidence.sparse is not None and evidence.dense is not None:
        parts.append(f"{evidence.value(evidence.dense, 'dense'):.4f} {evidence.dense.label}")
    if evidence.dense_start is not None and evidence.dense_start.label != final.label:
        parts.append(f"{evidence.dense_start.model.metrics[evidence.metric]:.4f} {evidence.dense_start.label}")
    return ", ".join(parts)


def _collapse(evidence: Evidence) -> str:
    return f"layer collapse: no weight is left in {', '.join(evidence.collapsed)}" if evidence.collapsed else ""
