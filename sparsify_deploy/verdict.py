"""What the measurements say: the gates, and one honest sentence on what to ship."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sparsify_deploy.reports import IN_FLOAT, SAME_GRAPH, BenchmarkReport, EngineRow, Gate, LayerChain, Row
from sparsify_deploy.timing import Comparison, Race

SPARSE_KERNELS = {"openvino": False, "onnxruntime": False, "tensorrt": True, "tensorrt_rtx": None}
"""Whether a runtime has kernels that skip 2:4 zeros and can be seen to pick them; None: it does not tell."""

_UNTRAINED = 0.25
"""The share of dense INT8's metric by which dense FP32 is worse where its own training was not finished."""


@dataclass(frozen=True)
class Evidence:
    """What a verdict rests on. `dense_start` is the dense FP32 model, `fine_tuned` the same after as many steps as the
    sparse branch fine-tunes for, the others the final models of the branches.

    `given` is an ONNX file that was not made here, alone but for `sparse`, which is the same where it holds 2:4. Its
    metrics are empty where there were no data.
    """

    metric: str
    direction: Literal["higher", "lower"]
    dense_start: Row | None
    dense: Row | None
    sparse: Row | None
    engines: tuple[EngineRow, ...]
    benchmarks: tuple[BenchmarkReport, ...]
    collapsed: tuple[str, ...] = ()
    chain: LayerChain | None = None
    given: Row | None = None
    fine_tuned: Row | None = None

    @property
    def race(self) -> Race | None:
        """The race that decides: the recipe's first runtime at its first batch size."""
        return self.benchmarks[0].races[0] if self.benchmarks and self.benchmarks[0].races else None

    def value(self, row: Row, branch: str | None = None) -> float:
        """The metric of a final model on the first engine that ran here, else that of the torch model."""
        measured = [e.metrics for e in self.engines if e.branch == branch and e.metrics is not None]
        return measured[0][self.metric] if measured else row.model.metrics[self.metric]

    @property
    def dense_float(self) -> Row | None:
        """The better of the two dense FP32 models, which differ in their weights alone and so are as fast."""
        start, tuned = self.dense_start, self.fine_tuned
        if start is None or tuned is None or not {self.metric} <= {*start.model.metrics} & {*tuned.model.metrics}:
            return start
        first, second = (row.model.metrics[self.metric] for row in (start, tuned))
        return tuned if self._gap(second, first) > 0 else start

    @property
    def untrained(self) -> bool:
        """Whether dense FP32 is so much worse than the dense INT8 model made of it that its training was unfinished."""
        row = self.dense_float
        if row is None or self.dense is None or self.given is not None or self.metric not in row.model.metrics:
            return False
        quantised = self.value(self.dense, "dense")
        return self._gap(quantised, row.model.metrics[self.metric]) > _UNTRAINED * abs(quantised)

    @property
    def reference(self) -> tuple[str, float] | None:
        """The model that accuracies are held against, and its metric: the file that was given, else the better dense
        FP32 model, else dense INT8 where that was not trained; None where it is not known."""
        row = self.given or self.dense_float
        if self.untrained and self.dense is not None:
            return self.dense.label, self.value(self.dense, "dense")
        if row is None or self.metric not in row.model.metrics:
            return None
        return row.label, row.model.metrics[self.metric]

    def drop(self, value: float) -> float | None:
        """How much worse than the `reference`, in the metric's unit; negative where it is better."""
        return self._gap(self.reference[1], value) if self.reference is not None else None

    def _gap(self, one: float, other: float) -> float:
        """How much better `one` is than `other`."""
        return one - other if self.direction == "higher" else other - one


def gates(evidence: Evidence, limits: Mapping[str, float | None]) -> tuple[Gate, ...]:
    """Each limit of the recipe beside what was measured."""
    final = evidence.given or evidence.sparse or evidence.dense
    branch = "given" if evidence.given else "sparse" if evidence.sparse else "dense"
    found = []
    if (limit := limits.get("max_drop")) is not None:
        drop = evidence.drop(evidence.value(final, branch)) if final else None
        against = evidence.reference[0] if evidence.reference else "dense FP32"
        other = "the file's in ONNX Runtime" if evidence.given else f"{against}'s"
        how = f"how much worse the final model's {evidence.metric} is than {other}, on all test examples"
        found.append(Gate("max_drop", limit, drop, None if drop is None else drop <= limit, how))
    if (limit := limits.get("min_speedup")) is not None:
        ratio = twin(evidence)
        other = "the dense twin" if evidence.dense else f"the {SAME_GRAPH}"
        how = f"median ratio to {other}, interleaved, first runtime and batch size"
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
    """The final sparse model against the final dense one, or without that against its own graph with dense weights."""
    if evidence.race is None or evidence.sparse is None:
        return None
    other = evidence.dense.label if evidence.dense is not None else SAME_GRAPH
    if not {other, evidence.sparse.label} <= {*evidence.race.labels}:
        return None
    return evidence.race.compare(evidence.sparse.label, other)


def verdict(evidence: Evidence, max_drop: float | None) -> str:
    """One line that starts with `Verdict:`: what to ship, what each step bought here, and what was not measured."""
    if evidence.given is not None:
        return _given_verdict(evidence, evidence.given, max_drop)
    if evidence.dense is None and evidence.sparse is None:
        return "Verdict: none, the run stopped before a final model."
    if evidence.race is None:
        parts = [
            f"none on latency: {_why_no_race(evidence)}",
            _accuracy(evidence),
            _start(evidence),
            _collapse(evidence),
        ]
        return "Verdict: " + "; ".join(part for part in parts if part) + "."
    parts = [
        _choice(evidence, max_drop),
        _int8(evidence),
        _sparse(evidence),
        _accuracy(evidence),
        _start(evidence),
        _collapse(evidence),
    ]
    return "Verdict: " + "; ".join(part for part in parts if part) + "."


def _why_no_race(evidence: Evidence) -> str:
    if not evidence.benchmarks:
        return "the recipe deploys to no runtime, or the run stopped before the benchmark"
    return f"{evidence.benchmarks[0].runtime} cannot run here ({evidence.benchmarks[0].not_run})"


def choice(evidence: Evidence, max_drop: float | None) -> str | None:
    """The simplest model that holds the accuracy gate and that no other acceptable one beats beyond the noise.

    A sparse one has to beat its dense twin too, if that is acceptable: near the noise being faster than a third model
    says nothing of the two. None where nothing was raced, where there is no dense twin to compare with, or where none
    holds the gate. A file that was given is its own start.
    """
    race, chosen = evidence.race, None
    if race is None or (evidence.dense_start is None and evidence.given is None):
        return None
    if evidence.given is not None and not evidence.given.model.metrics:
        return evidence.given.label  # what is faster was not shown to answer as well
    drops = {label: evidence.drop(value) for label, value in candidates(evidence).items() if label in race.labels}
    held = [label for label, drop in drops.items() if max_drop is None or drop is None or drop <= max_drop]
    for label in held:
        if chosen is None or (race.compare(label, chosen).claim == "faster" and _gains(evidence, label, held)):
            chosen = label
    return chosen


def _gains(evidence: Evidence, label: str, held: Sequence[str]) -> bool:
    """Whether being faster than another is the model's own: a sparse one's against its dense twin, if that is
    acceptable, and none of one dense FP32 model against the other."""
    if evidence.fine_tuned is not None and label == evidence.fine_tuned.label:
        return False
    found = twin(evidence)
    if found is None or label != found.label or found.baseline not in held:
        return True
    return found.claim == "faster"


def candidates(evidence: Evidence) -> dict[str, float]:
    """What could be shipped, the simplest first, with the metric; engines of lower precision by their own.

    Of the two dense FP32 models the better one alone, and none in float where that was not trained.
    """
    found: dict[str, float] = {}
    if evidence.given is not None:
        if not evidence.given.model.metrics:
            return found
        found[evidence.given.label] = evidence.value(evidence.given, "given")
    if (row := evidence.dense_float) is not None:
        found[row.label] = evidence.value(row, "dense" if row is evidence.fine_tuned is evidence.dense else None)
    raced = evidence.benchmarks[0].metrics if evidence.benchmarks else {}
    found |= {label: metrics[evidence.metric] for label, metrics in raced.items()}
    if evidence.untrained:
        found.clear()
    for row, branch in ((evidence.dense, "dense"), (evidence.sparse, "sparse")):
        if row is not None and row is not evidence.given:
            found.setdefault(row.label, evidence.value(row, branch))
    return found


def value_of(evidence: Evidence, label: str) -> tuple[float | None, str]:
    """A candidate's metric and on what it was taken; None where it is not known."""
    if evidence.given is not None and label not in candidates(evidence):
        return None, "not measured: the recipe has no data"
    raced = evidence.benchmarks[0].metrics if evidence.benchmarks else {}
    finals = ((evidence.dense, "dense"), (evidence.sparse, "sparse"))
    branch = next((name for row, name in finals if row is not None and row.label == label), None)
    if evidence.dense_start is not None and evidence.dense_start.label == label:
        branch = None
    branch = "given" if evidence.given is not None else branch
    by_engine = label in raced or any(e.branch == branch and e.metrics is not None for e in evidence.engines)
    how = "the engine itself" if by_engine else "the same model in torch"
    return candidates(evidence)[label], f"all test examples, {how}"


def _given_verdict(evidence: Evidence, given: Row, max_drop: float | None) -> str:
    """The verdict on a file that was not made here: what of it to ship, what INT8 and 2:4 are worth in it."""
    name = f"the file {given.label} ({given.model.precision})"
    held, total = sum(layer.usable for layer in given.model.layers), len(given.model.layers)
    dense = "" if held else f"0 of {total} layers hold 2:4, so no hardware can skip its zeros"
    accuracy = _given_accuracy(evidence, given)
    if evidence.race is None:
        parts = [f"none on latency: {_why_no_race(evidence)}", f"{held} of {total} layers hold 2:4", accuracy]
        return "Verdict: " + "; ".join(parts) + "."
    chosen = choice(evidence, max_drop)
    ship = f"ship {name if chosen == given.label else f'the {chosen}'}" if chosen else "nothing holds the accuracy gate"
    parts = [ship, *_given_ratios(evidence, given), _sparse(evidence), dense, accuracy]
    return "Verdict: " + "; ".join(part for part in parts if part) + "."


def _given_ratios(evidence: Evidence, given: Row) -> list[str]:
    """The file against its own float form and lower precision, where those took part."""
    race = evidence.race
    assert race is not None
    found = []
    for label in race.labels:
        if label in (given.label, SAME_GRAPH):
            continue
        pair = (given.label, label) if label == IN_FLOAT else (label, given.label)
        others = "".join(
            f", {other.compare(*pair).median:.2f}x at batch {other.batch_size}"
            for other in evidence.benchmarks[0].races[1:]
        )
        found.append(f"{pair[0]} against {pair[1]} is {times(race.compare(*pair))} here ({_setting(evidence)}{others})")
    return found


def _given_accuracy(evidence: Evidence, given: Row) -> str:
    if not given.model.metrics:
        return "accuracy was not measured, for the recipe has no data"
    return f"{evidence.metric} " + ", ".join(f"{value:.4f} {label}" for label, value in candidates(evidence).items())


def _choice(evidence: Evidence, max_drop: float | None) -> str:
    if evidence.dense_start is None:
        return "no recommendation, for there is no dense twin whose accuracy is known (dense_branch is off)"
    chosen = choice(evidence, max_drop)
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
    unknown = " (its accuracy is unknown)" if found.baseline == SAME_GRAPH else ""
    other = f"the {SAME_GRAPH}{unknown}" if unknown else "its dense twin"
    if found.claim == "faster":
        text = f"the sparse model against {other} is {times(found)}"
    elif found.claim == "slower" and SPARSE_KERNELS[runtime]:
        text = f"sparsity makes it slower on this runtime, against {other} ({times(found)})"
    else:
        against = f", against {other}" if unknown else ""
        why = {
            True: "",
            False: f", {runtime} has no sparse kernels",
            None: f", {runtime} does not tell which kernels are sparse",
        }[SPARSE_KERNELS[runtime]]
        text = f"sparsity adds no speed on this runtime ({times(found)}{against}{why})"
    if not held:
        return text + f"; 0 of {total} layers hold 2:4, so no hardware can use it"
    if SPARSE_KERNELS[runtime]:
        return text + f"; {held} of {total} layers hold 2:4, {_picked(evidence)}"
    return (
        text + f"; {held} of {total} layers hold 2:4, what that gains on an Ampere or Hopper GPU was not measured here"
    )


def _picked(evidence: Evidence) -> str:
    """How many layers the builder runs sparse, by its own word."""
    told = [layer.picked for layer in evidence.chain.layers if layer.picked is not None] if evidence.chain else []
    if not told:
        return "the builder did not tell which of them run sparse"
    return f"the builder picked sparse kernels for {sum(told)}"


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
    tuned = evidence.fine_tuned
    if tuned is not None and tuned is evidence.dense_float and tuned is not evidence.dense:
        parts.append(f"{tuned.model.metrics[evidence.metric]:.4f} {tuned.label}")
    if evidence.dense_start is not None and evidence.dense_start.label != final.label:
        parts.append(f"{evidence.dense_start.model.metrics[evidence.metric]:.4f} {evidence.dense_start.label}")
    return ", ".join(parts)


def _start(evidence: Evidence) -> str:
    """What stands in for dense FP32 where that is no measure of the others."""
    start, reference = evidence.dense_start, evidence.reference
    if start is None or reference is None or reference[0] == start.label:
        return ""
    if evidence.untrained:
        return (
            f"accuracies are held against {reference[0]} and nothing in float is shipped, for dense FP32 was not "
            "trained to the end: model.checkpoint, train or nm.fine_tune would train it"
        )
    return f"accuracies are held against {reference[0]}, the better of the two in FP32"


def _collapse(evidence: Evidence) -> str:
    return f"layer collapse: no weight is left in {', '.join(evidence.collapsed)}" if evidence.collapsed else ""
