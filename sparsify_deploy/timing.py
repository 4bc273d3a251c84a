"""Latency of one engine, and honest comparisons between several.

A comparison interleaves its variants (rounds in a shuffled order), takes one ratio per round and the median of those
with a bootstrap 95 % interval, and times the baseline twice: that A/A control is the noise floor below which nothing
is claimed. On shared CPUs the process's CPU time on one thread is steadier than the wall clock, so it decides there.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING, Literal, TypeAlias

from sparsify_deploy.process import native

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sparsify_deploy.types import Arrays, Session

Clock: TypeAlias = Literal["wall time", "process CPU time", "device time"]
"""What was read: process CPU time is that of all threads of this process, device time the GPU's own events."""

Claim: TypeAlias = Literal["faster", "slower", "within the noise"]
Variant: TypeAlias = "Callable[[], object] | Session"
"""A session with its inputs bound, its `execute`, or any function."""

STEADY_CV = 0.025
"""A coefficient of variation above this is flagged."""

LEAST_NOISE = 0.02
"""Nothing closer to 1 is claimed, however quiet the A/A control was: sessions of one engine, opened one after the
other, were seen to differ by that much for good, by where their memory lies."""

_BOOTSTRAPS = 2000


@dataclass(frozen=True)
class Latency:
    """One clock's view of many single executions, ms; `steady` is False where `cv` is above 2.5 %.

    `throughput_per_s` counts examples: the batch size over the mean.
    """

    clock: Clock
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    mean_ms: float
    cv: float
    steady: bool
    samples: int
    throughput_per_s: float
    batch_size: int
    threads: int


@dataclass(frozen=True)
class Comparison:
    """How many times faster `label` is than `baseline`: the median over rounds, its bootstrap 95 % interval, and what
    may be said of that."""

    label: str
    baseline: str
    median: float
    low: float
    high: float
    claim: Claim


@dataclass(frozen=True)
class Race:
    """The outcome of `race`: latencies by label and clock, and every label against every other.

    `clock` is the one that ratios are taken by. `control` is the baseline, the first label, against itself, and
    `noise` how far from 1 its interval reaches, but at least `LEAST_NOISE`.
    `round_ms` holds the median of every round by `clock`.
    """

    labels: tuple[str, ...]
    clock: Clock
    rounds: int
    seed: int
    batch_size: int
    threads: int
    latencies: Mapping[str, Latency]
    cpu_latencies: Mapping[str, Latency]
    device_latencies: Mapping[str, Latency]
    round_ms: Mapping[str, tuple[float, ...]]
    comparisons: tuple[Comparison, ...]
    control: Comparison
    noise: float

    def compare(self, label: str, baseline: str) -> Comparison:
        """How `label` did against `baseline`. Raises KeyError for a label that did not take part."""
        for found in self.comparisons:
            if (found.label, found.baseline) == (label, baseline):
                return found
        raise KeyError(f"{label!r} was not raced against {baseline!r}")


@dataclass(frozen=True)
class Copies:
    """What the engine's time leaves out, ms of wall time, medians: copying inputs in and outputs out."""

    label: str
    batch_size: int
    bind_ms: float
    fetch_ms: float
    samples: int


@dataclass(frozen=True)
class Surroundings:
    """What else went on while something was timed: the load average over a minute, None where the system has none,
    and the GPUs' clocks, "" without a GPU. Nothing here locks clocks."""

    load: float | None
    gpu_clocks: str


def copies(
    session: Session,
    inputs: Arrays,
    label: str,
    batch_size: int,
    *,
    times: int = 10,
    wall: Callable[[], int] = time.perf_counter_ns,
) -> Copies:
    """Time `bind` and `fetch` of a session, which is left with `inputs` bound."""
    bound, fetched = [], []
    with native.call(f"timing the copies of {label}", batch_size) as renew:
        for _ in range(times):
            renew()
            start = wall()
            session.bind(inputs)
            bound.append((wall() - start) / 1e6)
            session.execute()
            start = wall()
            session.fetch()
            fetched.append((wall() - start) / 1e6)
    return Copies(label, batch_size, statistics.median(bound), statistics.median(fetched), times)


def surroundings() -> Surroundings:
    """The machine's state as it is now."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return Surroundings(load, _gpu_clocks())


def _gpu_clocks() -> str:
    """`1410 MHz SM, 1215 MHz memory, not locked` for every GPU that nvidia-smi knows."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown: nvidia-smi: {type(error).__name__}"
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    if done.returncode != 0:
        return ""
    return "; ".join(f"{row[0]} MHz SM, {row[1]} MHz memory, not locked" for row in rows if len(row) == 2)


def measure(
    variant: Variant,
    *,
    batch_size: int = 1,
    threads: int = 1,
    warmup_ms: float = 200.0,
    min_ms: float = 3000.0,
    min_iterations: int = 100,
    clock: Clock = "wall time",
    wall: Callable[[], int] = time.perf_counter_ns,
    cpu: Callable[[], int] = time.process_time_ns,
) -> Latency:
    """Warm up, then execute until both `min_ms` of wall time and `min_iterations` are reached."""
    recorder = _Recorder(variant, wall, cpu)
    with native.call("timing an engine", batch_size) as renew:
        recorder.run(warmup_ms, renew=renew)
        recorder.forget()
        recorder.run(min_ms, min_iterations, renew)
    return recorder.latency(clock, batch_size, threads)


def race(
    variants: Mapping[str, Variant],
    *,
    control: Variant | None = None,
    rounds: int = 20,
    round_ms: float = 30.0,
    warmup_ms: float = 200.0,
    seed: int = 0,
    batch_size: int = 1,
    threads: int = 1,
    clock: Clock | None = None,
    wall: Callable[[], int] = time.perf_counter_ns,
    cpu: Callable[[], int] = time.process_time_ns,
) -> Race:
    """Time `variants` in interleaved rounds. The first one is the baseline and runs twice a round, as A/A control.

    `control` should be the baseline opened a second time: two sessions of one engine differ by where their memory
    lies, and the noise floor has to contain that. None runs the baseline's own session again.
    `clock` None: device time where every variant has it; else process CPU time for `threads == 1` on the CPU; else
    wall time.
    """
    import numpy as np

    used = clock or clock_for(list(variants.values()), threads)
    labels = tuple(variants)
    recorders = {label: _Recorder(variant, wall, cpu) for label, variant in variants.items()}
    twin = _Recorder(control if control is not None else variants[labels[0]], wall, cpu)
    everyone = [*recorders.values(), twin]
    names = [*labels, labels[0]]
    for recorder, name in zip(everyone, names, strict=True):
        with native.call(f"timing {name}", batch_size) as renew:
            recorder.run(warmup_ms, renew=renew)
        recorder.forget()
    random = np.random.default_rng(seed)
    for _ in range(rounds):
        for i in random.permutation(len(everyone)):
            everyone[i].start_round()
            with native.call(f"timing {names[i]}", batch_size) as renew:
                everyone[i].run(round_ms, renew=renew)
    medians = {label: recorder.round_medians(used) for label, recorder in recorders.items()}
    aa = _interval(medians[labels[0]] / twin.round_medians(used), random)
    noise = max(1.0 - aa[1], aa[2] - 1.0, LEAST_NOISE)
    comparisons = []
    for label, baseline in permutations(labels, 2):
        found = _interval(medians[baseline] / medians[label], random)
        comparisons.append(Comparison(label, baseline, *found, claim(*found, noise)))
    has_device = [label for label, recorder in recorders.items() if recorder.has_device]
    return Race(
        labels=labels,
        clock=used,
        rounds=rounds,
        seed=seed,
        batch_size=batch_size,
        threads=threads,
        latencies={label: recorders[label].latency("wall time", batch_size, threads) for label in labels},
        cpu_latencies={label: recorders[label].latency("process CPU time", batch_size, threads) for label in labels},
        device_latencies={label: recorders[label].latency("device time", batch_size, threads) for label in has_device},
        round_ms={label: tuple(float(value) / 1e6 for value in medians[label]) for label in labels},
        comparisons=tuple(comparisons),
        control=Comparison(labels[0], labels[0], *aa, "within the noise"),
        noise=noise,
    )


def claim(median: float, low: float, high: float, noise: float) -> Claim:
    """What may be said of a ratio: nothing where its interval holds 1 or its median lies within `noise` of 1."""
    if low <= 1.0 <= high or abs(median - 1.0) <= noise:
        return "within the noise"
    return "faster" if median > 1.0 else "slower"


def clock_for(variants: Sequence[Variant], threads: int) -> Clock:
    """The steadiest clock that is fair to all of `variants`; CPU time says nothing of an engine on a GPU."""
    sessions = [_session(variant) for variant in variants]
    if all(hasattr(type(session), "device_ms") for session in sessions):
        return "device time"
    on_cpu = all(getattr(session, "device", "CPU") == "CPU" for session in sessions)
    fine = time.get_clock_info("process_time").resolution <= 1e-6  # it ticks in 15 ms on Windows
    return "process CPU time" if threads == 1 and on_cpu and fine else "wall time"


def _session(variant: Variant) -> object:
    """What a bound `execute` belongs to, else the variant itself."""
    return getattr(variant, "__self__", variant)


class _Recorder:
    """Executes one variant and keeps every duration, ns, with the index at which each round starts."""

    def __init__(self, variant: Variant, wall: Callable[[], int], cpu: Callable[[], int]) -> None:
        self._session = _session(variant)
        self._execute = variant if callable(variant) else variant.execute
        self.has_device = hasattr(type(self._session), "device_ms")
        self._wall, self._cpu = wall, cpu
        self.forget()

    def forget(self) -> None:
        """Drop all durations and rounds."""
        self._taken: dict[Clock, list[float]] = {"wall time": [], "process CPU time": [], "device time": []}
        self._starts: list[int] = []

    def start_round(self) -> None:
        """What is executed from here on belongs to a new round."""
        self._starts.append(len(self._taken["wall time"]))

    def run(self, least_ms: float, least_times: int = 1, renew: Callable[[], None] = lambda: None) -> None:
        """Execute until `least_ms` of wall time and `least_times` executions are over.

        `renew` is called, outside of what is timed, about once a second.
        """
        now = self._wall()
        end, times, renewed = now + least_ms * 1e6, 0, now
        while times < least_times or self._wall() < end:
            cpu_before = self._cpu()
            wall_before = self._wall()
            self._execute()
            wall_after = self._wall()
            cpu_after = self._cpu()
            self._taken["wall time"].append(wall_after - wall_before)
            self._taken["process CPU time"].append(cpu_after - cpu_before)
            if self.has_device:
                self._taken["device time"].append(getattr(self._session, "device_ms") * 1e6)  # noqa: B009 no attribute of object
            times += 1
            if wall_after - renewed > 1e9:
                renew()
                renewed = wall_after

    def round_medians(self, clock: Clock) -> NDArray[np.float64]:
        """The median duration of every round, ns."""
        import numpy as np

        return np.array([np.median(part) for part in np.split(np.array(self._taken[clock]), self._starts[1:])])

    def latency(self, clock: Clock, batch_size: int, threads: int) -> Latency:
        """All durations by one clock."""
        import numpy as np

        taken = np.array(self._taken[clock]) / 1e6
        p50, p90, p95, p99 = (float(value) for value in np.percentile(taken, [50, 90, 95, 99]))
        mean = float(taken.mean())
        cv = float(taken.std()) / mean if mean > 0 else 0.0
        return Latency(
            clock=clock,
            p50_ms=p50,
            p90_ms=p90,
            p95_ms=p95,
            p99_ms=p99,
            mean_ms=mean,
            cv=cv,
            steady=cv <= STEADY_CV,
            samples=len(taken),
            throughput_per_s=batch_size * 1000.0 / mean if mean > 0 else 0.0,
            batch_size=batch_size,
            threads=threads,
        )


def _interval(per_round: NDArray[np.float64], random: np.random.Generator) -> tuple[float, float, float]:
    """The median and its bootstrap 95 % interval."""
    import numpy as np

    drawn = random.integers(0, len(per_round), size=(_BOOTSTRAPS, len(per_round)))
    low, high = np.percentile(np.median(per_round[drawn], axis=1), [2.5, 97.5])
    return float(np.median(per_round)), float(low), float(high)
