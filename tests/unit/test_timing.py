"""Latencies and races against a clock that only moves when a variant runs."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from sparsify_deploy.timing import STEADY_CV, Race, claim, clock_for, measure, race


class FakeTime:
    """Wall and CPU nanoseconds; reading them costs nothing."""

    def __init__(self):
        self.wall_ns = self.cpu_ns = 0

    def wall(self):
        return self.wall_ns

    def cpu(self):
        return self.cpu_ns

    def variant(self, cost_ns, cpu_share=1.0):
        """A function that takes `cost_ns()` of wall time, and that share of it on the CPU."""

        def run():
            cost = int(cost_ns())
            self.wall_ns += cost
            self.cpu_ns += int(cost * cpu_share)

        return run

    @property
    def clocks(self):
        return {"wall": self.wall, "cpu": self.cpu}


def noisy(mean_ns, spread, seed):
    random = np.random.default_rng(seed)
    return lambda: mean_ns * (1 + spread * random.standard_normal())


def raced(fake, variants, **options):
    settings = {"rounds": 20, "round_ms": 1.0, "warmup_ms": 0.5, "seed": 3, **fake.clocks, **options}
    return race(variants, **settings)


def test_percentiles_mean_and_throughput_are_those_of_the_samples():
    fake = FakeTime()
    costs = iter([5e6] + [i * 1e6 for i in range(1, 101)])
    found = measure(
        fake.variant(lambda: next(costs)), batch_size=4, warmup_ms=1.0, min_ms=5050.0, min_iterations=2, **fake.clocks
    )
    values = np.arange(1, 101)
    assert found.samples == 100
    assert found.clock == "wall time"
    assert found.p50_ms == pytest.approx(50.5)
    assert found.p90_ms == pytest.approx(np.percentile(values, 90))
    assert found.p95_ms == pytest.approx(np.percentile(values, 95))
    assert found.p99_ms == pytest.approx(np.percentile(values, 99))
    assert found.mean_ms == pytest.approx(50.5)
    assert found.throughput_per_s == pytest.approx(4 * 1000 / 50.5)
    assert found.cv == pytest.approx(values.std() / 50.5)
    assert not found.steady


def test_measuring_goes_on_until_both_limits_are_reached():
    for cost_ns, samples in ((1e6, 50), (10e6, 20)):
        fake = FakeTime()
        found = measure(
            fake.variant(lambda cost=cost_ns: cost), warmup_ms=3.0, min_ms=50.0, min_iterations=20, **fake.clocks
        )
        assert found.samples == samples
        assert found.steady
        assert found.cv <= STEADY_CV


def test_cpu_time_is_told_apart_from_wall_time():
    fake = FakeTime()
    slept = fake.variant(lambda: 2e6, cpu_share=0.25)
    found = measure(slept, warmup_ms=1, min_ms=20, min_iterations=1, clock="process CPU time", **fake.clocks)
    assert found.mean_ms == pytest.approx(0.5)


def test_a_known_ratio_is_recovered():
    fake = FakeTime()
    outcome = raced(
        fake, {"dense": fake.variant(noisy(30_000, 0.02, 1)), "sparse": fake.variant(noisy(20_000, 0.02, 2))}
    )
    found = outcome.compare("sparse", "dense")
    assert found.median == pytest.approx(1.5, rel=0.01)
    assert found.low <= found.median <= found.high
    assert found.high - found.low < 0.02
    assert found.claim == "faster"
    back = outcome.compare("dense", "sparse")
    assert back.median == pytest.approx(1 / 1.5, rel=0.01)
    assert back.claim == "slower"
    assert outcome.labels == ("dense", "sparse")
    assert outcome.clock == "process CPU time"
    assert outcome.latencies["sparse"].clock == "wall time"
    assert outcome.cpu_latencies["sparse"].mean_ms == pytest.approx(0.02, rel=0.01)
    assert outcome.device_latencies == {}
    assert len(outcome.round_ms["dense"]) == 20


def test_the_control_is_the_baseline_against_itself():
    fake = FakeTime()
    outcome = raced(fake, {"dense": fake.variant(noisy(30_000, 0.3, 1)), "other": fake.variant(lambda: 10_000)})
    assert outcome.latencies["other"].samples == 20 * 100  # the warm-up is not among them
    assert (outcome.control.label, outcome.control.baseline) == ("dense", "dense")
    assert outcome.control.median == pytest.approx(1, abs=0.15)
    assert outcome.control.low < outcome.control.median < outcome.control.high
    assert outcome.noise == max(1 - outcome.control.low, outcome.control.high - 1)


def test_equal_variants_make_no_claim():
    claims = []
    for seed in range(20):
        fake = FakeTime()
        variants = {name: fake.variant(noisy(30_000, 0.2, seed * 2 + i)) for i, name in enumerate("ab")}
        claims.append(raced(fake, variants, seed=seed).compare("b", "a").claim)
    assert claims.count("within the noise") >= 18


def test_drift_that_hits_all_alike_cancels():
    """A machine that gets three times slower on the way changes the latencies and not the ratio."""
    fake = FakeTime()

    def drifting(base):
        return fake.variant(lambda: base * (1 + 2 * min(1.0, fake.wall_ns / 60e6)))

    outcome = raced(fake, {"a": drifting(30_000), "b": drifting(20_000)})
    assert not outcome.latencies["a"].steady
    assert outcome.compare("b", "a").median == pytest.approx(1.5, rel=0.03)


@pytest.mark.parametrize(
    ("median", "low", "high", "noise", "want"),
    [
        (1.20, 1.10, 1.30, 0.05, "faster"),
        (0.80, 0.70, 0.90, 0.05, "slower"),
        (1.20, 0.99, 1.30, 0.05, "within the noise"),
        (0.80, 0.70, 1.01, 0.05, "within the noise"),
        (1.20, 1.10, 1.30, 0.25, "within the noise"),
        (0.80, 0.70, 0.90, 0.20001, "within the noise"),
    ],
)
def test_claims(median, low, high, noise, want):
    assert claim(median, low, high, noise) == want


def test_noise_of_the_control_silences_a_small_gain():
    """Every pass over the baseline comes out alternately fast and slow; a steady 3 % gain is then no claim."""
    fake = FakeTime()
    turn = iter(range(10**9))
    outcome = raced(
        fake,
        {
            "dense": fake.variant(lambda: 600_000 if next(turn) % 2 else 900_000),
            "sparse": fake.variant(lambda: 728_000),
        },
        rounds=21,
        round_ms=0.5,
    )
    assert outcome.noise > 0.05
    assert outcome.compare("sparse", "dense").claim == "within the noise"


def test_rounds_interleave_in_an_order_that_the_seed_shuffles():
    def order(seed):
        fake, seen = FakeTime(), []
        inner = fake.variant(lambda: 1_000_000)
        raced(fake, {name: lambda name=name: (seen.append(name), inner()) for name in "abc"}, seed=seed, rounds=6)
        return seen[4:]  # one warm-up execution each, the control's included

    first = order(0)
    rounds = [first[i : i + 4] for i in range(0, len(first), 4)]
    assert len(rounds) == 6
    assert all(sorted(each) == ["a", "a", "b", "c"] for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1
    assert order(0) == first
    assert order(1) != first


def test_the_same_seed_gives_the_same_race():
    def once():
        fake = FakeTime()
        return raced(fake, {name: fake.variant(noisy(30_000, 0.1, i)) for i, name in enumerate("ab")})

    assert once() == once()


def test_a_race_is_json_and_comes_back():
    from pydantic import TypeAdapter

    fake = FakeTime()
    outcome = raced(fake, {"b": fake.variant(lambda: 1000), "a": fake.variant(lambda: 2000)})
    text = json.dumps(asdict(outcome), allow_nan=False, sort_keys=True)
    assert TypeAdapter(Race).validate_json(text) == outcome


def test_who_did_not_race_is_a_key_error():
    fake = FakeTime()
    outcome = raced(fake, {"a": fake.variant(lambda: 1000)})
    with pytest.raises(KeyError, match="'b' was not raced against 'a'"):
        outcome.compare("b", "a")


class CpuSession:
    device = "CPU"

    def __init__(self, fake, cost_ns=1000):
        self.run = fake.variant(lambda: cost_ns)

    def execute(self):
        self.run()


class GpuSession(CpuSession):
    device = "GPU"
    executed = False

    def execute(self):
        self.run()
        self.executed = True

    @property
    def device_ms(self):
        if not self.executed:
            raise AssertionError("there are no events before the first execute")
        return 0.25


class CudaProviderSession(CpuSession):
    device = "GPU"


def test_the_clock_is_fair_to_everyone():
    fake = FakeTime()
    cpu, gpu, provider = CpuSession(fake), GpuSession(fake), CudaProviderSession(fake)
    assert clock_for([cpu, cpu.execute], 1) == "process CPU time"
    assert clock_for([cpu], 2) == "wall time"
    assert clock_for([gpu, gpu.execute], 1) == "device time"
    assert clock_for([gpu, cpu], 1) == "wall time"
    assert clock_for([cpu, provider.execute], 1) == "wall time"


def test_device_time_is_what_the_session_says():
    fake = FakeTime()
    outcome = raced(fake, {"a": GpuSession(fake), "b": GpuSession(fake).execute})
    assert outcome.clock == "device time"
    assert outcome.device_latencies["b"].p50_ms == 0.25
    assert outcome.latencies["b"].p50_ms == pytest.approx(0.001)
    assert outcome.compare("b", "a").median == 1


def test_a_race_with_real_clocks_runs():
    outcome = race({"a": lambda: sum(range(200)), "b": lambda: sum(range(200))}, rounds=5, round_ms=0.5, warmup_ms=0.5)
    assert outcome.latencies["a"].samples >= 5
    assert outcome.rounds == 5
