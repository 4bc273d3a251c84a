"""The harness of the tables of methods: grids, a run of one, its resuming, claims and the table's text."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from harness import cifar10, mnist, table, work, workers
from harness.claims import judge
from harness.grid import Claim, Run, density_of

from sparsify_deploy import menu, pipeline
from sparsify_deploy.errors import Interrupted
from sparsify_deploy.recipe_source import load
from sparsify_deploy.types import Silent

TINY = {
    "version": 1,
    "seed": 0,
    "threads": 1,
    "dense_branch": False,
    "model": {"source": "builtin", "params": {"name": "lenet-300-100", "image_size": 8}},
    "data": {"source": "digits"},
    "training": {"steps": 3, "batch_size": 16},
}
STATIC = {**TINY, "sparsity": 0.9, "init": {"criterion": "random"}, "train": {"method": "static"}}
GRID = dataclasses.replace(
    mnist.grid(Path("mnist.npz"), 1, 1.0),
    runs=(
        Run("dense", "dense", 0, "a", {**TINY, "train": {"method": "dense"}}),
        Run("static", "n7", 0, "b", STATIC),
        Run("rigl", "n7", 0, "b", {**STATIC, "train": {"method": "rigl"}}),
    ),
)


class StopsAt(Silent):
    """Raises what a person's Ctrl-C leads to, at the second step of a fit."""

    def update(self, label: str, done: int, total: int, note: str = "") -> None:
        if label.startswith("train") and done == 2:
            raise Interrupted("asked to stop")


@pytest.fixture
def jobs(tmp_path: Path) -> dict[str, work.Job]:
    return work.jobs(GRID, tmp_path, tmp_path / "store", "cpu")


@pytest.mark.parametrize("grid", [mnist.grid(Path("mnist.npz"), 3, 10.0), cifar10.grid(Path("cifar10"), 1, 8.0)])
def test_every_recipe_of_a_grid_is_valid_and_has_a_place_in_the_table(grid: Any, tmp_path: Path) -> None:
    written = work.jobs(grid, tmp_path, tmp_path / "store", "cpu")
    assert len(written) == len(grid.runs)  # no two of one name
    rows, columns = {row.key for row in grid.rows}, {column.key for column in grid.columns}
    for run in grid.runs:
        method = run.recipe["train"]["method"]
        assert method in menu.names("methods")
        assert load(written[run.name].recipe).seed == run.seed
        assert run.row in rows
        assert {run.column, *run.also} <= columns
    assert {cell[0] for claim in grid.claims for cell in (claim.better, claim.worse)} <= rows
    assert {cell[1] for claim in grid.claims for cell in (claim.better, claim.worse)} <= columns


def test_one_seed_comes_before_the_next_and_shares_a_lane_only_where_it_shares_stages() -> None:
    runs = mnist.grid(Path("mnist.npz"), 2, 10.0).runs
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    lanes = {run.name: run.lane for run in runs}
    assert lanes["rigl-n10-s0"] == lanes["static-n10-s0"] != lanes["static-n13-s0"]
    assert lanes["nm-refill-2of4-s1"] == lanes["dense-dense-s1"] != lanes["dense-dense-s0"]


def test_the_columns_are_the_densities_of_iterative_pruning() -> None:
    grid = mnist.grid(Path("mnist.npz"), 1, 10.0)
    assert [column.head for column in grid.columns] == ["1", "2:4", ".21", ".11", ".055", ".018", ".0092"]
    sparse = next(run for run in grid.runs if run.name == "synflow-n18-s0")
    assert sparse.recipe["sparsity"] == pytest.approx(1 - 0.8**18)
    assert density_of(21) == pytest.approx(0.00922, abs=1e-5)


def test_a_run_is_kept_found_again_and_judged_by_its_fingerprint(jobs: dict[str, work.Job]) -> None:
    run, job = GRID.runs[1], jobs["static-n7-s0"]
    assert work.finished(run, job) is None
    result = work.perform(job, Silent())
    assert list(result["steps"]) == ["sparse/init_mask", "sparse/train"]  # no ONNX file, no latency
    assert result["density"] == pytest.approx(0.1, abs=1e-3)
    assert result["relative_training_flops"] == [pytest.approx(0.1, abs=0.1)]
    assert 0.0 <= result["metrics"]["accuracy"] <= 1.0
    asked = {"sparsity": 0.9, "init": {"criterion": "random"}, "train": {"method": "static"}}
    assert work.finished(run, job) == {**result, "row": "static", "column": "n7", "seed": 0, "recipe": asked}
    again = work.perform(job, Silent())
    assert again["metrics"] == result["metrics"]
    assert again["fingerprint"] == result["fingerprint"]

    job.result.write_text(json.dumps({**result, "fingerprint": "0" * 64}), encoding="utf-8")
    assert work.finished(run, job) is None  # made from what is no longer in the store
    work.perform(job, Silent())
    assert work.finished(run, job) is not None
    recipe = json.loads(job.recipe.read_text(encoding="utf-8"))
    job.recipe.write_text(json.dumps({**recipe, "seed": 1}), encoding="utf-8")
    assert work.finished(run, job) is None  # another recipe's result is not this one's


def test_runs_of_one_lane_share_the_mask(jobs: dict[str, work.Job]) -> None:
    first = work.perform(jobs["static-n7-s0"], Silent())
    second = work.perform(jobs["rigl-n7-s0"], Silent())
    prints = [result["steps"]["sparse/init_mask"]["fingerprint"] for result in (first, second)]
    assert prints[0] == prints[1]
    assert second["steps"]["sparse/init_mask"]["cpu_s"] is None  # cached: nothing was measured
    assert second["steps"]["sparse/train"]["cpu_s"] is not None


def test_a_run_that_was_stopped_goes_on_and_claims_no_time(jobs: dict[str, work.Job]) -> None:
    job = jobs["static-n7-s0"]
    with pytest.raises(Interrupted):
        work.perform(job, StopsAt())
    assert not job.result.exists()
    assert pipeline.survey(work.opened(job)[1], work.opened(job)[0].store)[-1].state == "partial"
    result = work.perform(job, Silent())
    assert result["optimizer_steps"] == [3]
    assert result["steps"]["sparse/train"]["wall_s"] is None


def test_workers_report_a_failing_run_by_name_and_the_others_go_on(jobs: dict[str, work.Job], tmp_path: Path) -> None:
    bad = tmp_path / "recipes" / "dense-dense-s0.yaml"
    bad.write_text(bad.read_text(encoding="utf-8").replace('"dense"', '"densse"'), encoding="utf-8")
    events: list[workers.Event] = []
    assert workers.run_all([jobs["dense-dense-s0"], jobs["static-n7-s0"]], 1, events.append)
    ends = {event.run: event for event in events if event.kind not in {"began", "progress"}}
    assert ends["dense-dense-s0"].kind == "failed"
    assert "densse" in ends["dense-dense-s0"].text
    assert "\n" not in ends["dense-dense-s0"].text
    assert ends["static-n7-s0"].kind == "done"
    assert jobs["static-n7-s0"].result.is_file()


def test_no_two_runs_of_a_lane_at_a_time(monkeypatch: pytest.MonkeyPatch, jobs: dict[str, work.Job]) -> None:
    started: list[workers._Worker] = []

    class Alive:
        def is_alive(self) -> bool:
            return True

    class Sent:
        def send(self, job: work.Job) -> None:
            pass

    def start(place: int) -> workers._Worker:
        started.append(workers._Worker(Alive(), Sent()))  # type: ignore[arg-type]
        return started[-1]

    monkeypatch.setattr(workers, "_start", start)
    queue = [jobs["static-n7-s0"], jobs["rigl-n7-s0"], jobs["dense-dense-s0"]]
    at_work: list[workers._Worker] = []
    workers._hand_out(queue, at_work, 3, lambda _: None)
    assert [worker.job and worker.job.name for worker in at_work] == ["static-n7-s0", "dense-dense-s0"]
    assert [job.name for job in queue] == ["rigl-n7-s0"]


CLAIM = Claim("a within half a point of b", ("a", "x"), ("b", "x"), -0.5)


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ([98.0, 98.2], [98.2, 98.4], "holds"),
        ([97.7, 97.9], [98.2, 98.4], "holds within the spread"),
        ([97.6, 97.8], [98.2, 98.4], "missed within the spread"),
        ([97.0, 97.2], [98.2, 98.4], "does not hold"),
        ([98.0], [98.2, 98.4], "holds, spread unknown"),
        ([97.0], [98.2, 98.4], "missed, spread unknown"),
        ([], [98.2, 98.4], "not run"),
    ],
)
def test_a_claim_is_judged_by_the_spread_of_the_seeds(first: list[float], second: list[float], verdict: str) -> None:
    assert judge(CLAIM, {("a", "x"): first, ("b", "x"): second}).verdict == verdict


def test_the_spread_is_the_pooled_deviation() -> None:
    judged = judge(CLAIM, {("a", "x"): [97.0, 99.0, 98.0], ("b", "x"): [90.0, 92.0, 94.0]})
    assert judged.spread == pytest.approx(math.sqrt((1.0 + 4.0) / 2))
    assert judged.surplus == pytest.approx(98.0 - 92.0 + 0.5)


def result(row: str, column: str, seed: int, accuracy: float, **more: Any) -> Any:
    plain: dict[str, Any] = {
        "row": row,
        "column": column,
        "seed": seed,
        "metrics": {"accuracy": accuracy},
        "relative_training_flops": [0.25],
        "collapsed": [],
        "collapsed_at_init": [],
        "levels": [],
        "steps": {"sparse/train": {"cpu_s": 18.4, "wall_s": 20.0}},
    }
    return {**plain, **more}


def test_the_table_shows_mean_deviation_seeds_cost_and_collapse() -> None:
    levels = [
        {"level": n, "metrics": {"accuracy": 0.9 + n / 1000}, "relative_training_flops": 1.0 + n, "collapsed": []}
        for n in range(22)
    ]
    found = [
        result("synflow", "n18", 0, 0.94),
        result("synflow", "n18", 1, 0.96),
        result("magnitude", "n21", 0, 0.098, collapsed_at_init=["fc1.weight"]),
        result("imp-finetune", "n21", 0, 0.921, levels=levels),
    ]
    text = table.markdown(mnist.grid(Path("mnist.npz"), 3, 10.0), found, ["snip-n7-s0"])
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in text.splitlines() if line.startswith("|")}
    assert rows["SynFlow at init, static"][6] == "95.00 ± 1.41 (2)"
    assert rows["SynFlow at init, static"][3] == "not run"
    assert rows["SynFlow at init, static"][8] == "0.25x"
    assert rows["SynFlow at init, static"][9].strip("| ") == "18"
    assert rows["IMP, fine-tuning"][1] == "90.00 (1)"
    assert rows["IMP, fine-tuning"][4] == "91.00 (1)"
    assert rows["IMP, fine-tuning"][8] == "1x / 8x / 11x / 14x / 19x / 22x"
    assert "- magnitude, density .0092: no weight is left in fc1.weight" in text
    assert "Failed: snip-n7-s0." in text
    assert "4 of 216 runs" in text


def test_the_report_names_no_folder(tmp_path: Path, jobs: dict[str, work.Job]) -> None:
    work.perform(jobs["static-n7-s0"], Silent())
    kept = work.finished(GRID.runs[1], jobs["static-n7-s0"])
    text = json.dumps(table.report(GRID, [kept], ["rigl-n7-s0"]))
    assert str(tmp_path) not in text
    assert json.loads(text)["runs"][0]["metrics"] == kept["metrics"]
    assert json.loads(text)["machine"]["cpu"]


def test_a_progress_of_a_worker_is_sent_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[workers.Event] = []
    clock = iter([10.0, 10.1, 10.7])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))

    class Kept:
        def send(self, event: workers.Event) -> None:
            sent.append(event)

    reporter = workers._Reporter(Kept(), 0, "static-n7-s0")  # type: ignore[arg-type]
    for done in range(3):
        reporter.update("train", done, 3)
    assert [event.done for event in sent] == [0, 2]
