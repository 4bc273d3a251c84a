"""The tables of training methods: a grid of recipes through the package's own pipeline, then one table of accuracies.

    python benchmarks/methods.py mnist --data ../data/mnist.npz [--jobs 2] [--results benchmarks/results]
    python benchmarks/methods.py rewiring --data ../data/mnist.npz
    python benchmarks/methods.py cifar10 --data ../data/cifar10 [--epochs 160 --precision bf16]

The work folder holds every run's recipe, its stages and its result, so that the same command goes on where it was
stopped, and `--table-only` shows what is there. `--only` limits what is run, not what is shown. A run that fails is
named and the others go on. Exit code 1 where one failed, 75 where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from harness import cifar10, mnist, rewiring
from harness.grid import Grid, Run
from harness.table import markdown, report
from harness.work import Job, finished, jobs
from harness.workers import Event, run_all
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from sparsify_deploy.errors import Interrupted, SparsifyError
from sparsify_deploy.types import Json


class Display:
    """Events on stderr: bars on a terminal, one line a finished run everywhere."""

    def __init__(self, total: int, failures: dict[str, str]) -> None:
        self._failures = failures
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn())
        self._bars = Progress(*columns, TimeElapsedColumn(), console=self._console, transient=True)
        self._total, self._over = total, 0
        self._whole = self._bars.add_task("runs", total=total)
        self._workers: dict[int, TaskID] = {}

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Draw bars meanwhile, on a terminal."""
        if not self._console.is_terminal:
            yield
            return
        with self._bars:
            yield

    def __call__(self, event: Event) -> None:
        if event.worker not in self._workers:
            self._workers[event.worker] = self._bars.add_task("", total=None)
        bar = self._workers[event.worker]
        if event.kind in {"began", "progress"}:
            text = f"{event.run} {event.text}".strip()
            self._bars.update(bar, description=text, completed=event.done, total=event.total or None)
            return
        self._over += 1
        self._bars.update(self._whole, completed=self._over)
        if event.kind == "failed":
            self._failures[event.run] = event.text
        said = _said(event) if event.kind == "done" else f"{event.kind.upper()}: {event.text}"
        self._console.print(f"{self._over} of {self._total} {event.run}: {said}", markup=False)


def _said(event: Event) -> str:
    last = list(event.result["steps"].values())[-1]
    seconds = f"{last['cpu_s']:.1f} s CPU" if last["cpu_s"] is not None else "cached or gone on with"
    return f"accuracy {event.result['metrics']['accuracy']:.4f}, {seconds}"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("grid", choices=("mnist", "rewiring", "cifar10"))
    parser.add_argument("--data", type=Path, help="mnist.npz, or the folder with CIFAR-10's parquet files")
    parser.add_argument("--work", type=Path, help="recipes and results; default runs/methods-GRID")
    parser.add_argument("--store", type=Path, help="stages; default WORK/store")
    parser.add_argument("--results", type=Path, help="where the JSON and the Markdown table go; default WORK")
    parser.add_argument("--jobs", type=int, default=2, help="worker processes, one thread each")
    parser.add_argument("--seeds", type=int, help="default 3, for cifar10 1")
    parser.add_argument("--only", action="append", default=[], help="run what this shell pattern means; repeatable")
    parser.add_argument("--epochs", type=float, help="default 10, for cifar10 8")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of cifar10's training")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--table-only", action="store_true", help="run nothing, show what is there")
    parser.add_argument("--json", action="store_true", help="print everything measured, not the table")
    return parser.parse_args()


def chosen(asked: argparse.Namespace) -> Grid:
    """The grid that the command line asks for."""
    if asked.grid in ("mnist", "rewiring"):
        data = asked.data or Path("../data/mnist.npz")
        if asked.grid == "rewiring":
            return rewiring.grid(data.absolute(), asked.seeds or 3, asked.epochs or rewiring.EPOCHS)
        return mnist.grid(data.absolute(), asked.seeds or 3, asked.epochs or mnist.EPOCHS)
    data = asked.data or Path("../data/cifar10")
    return cifar10.grid(data.absolute(), asked.seeds or 1, asked.epochs or cifar10.EPOCHS, asked.precision)


def main() -> int:
    """Run what is missing, then print and write the table."""
    asked = arguments()
    grid = chosen(asked)
    work = asked.work or Path("runs") / grid.name
    every = jobs(grid, work, asked.store or work / "store", asked.device)
    meant = [run for run in grid.runs if run.matches(tuple(asked.only))]
    if not meant:
        sys.stderr.write(f"methods: --only means no run; they are called like {grid.runs[0].name}\n")
        return 2
    failures: dict[str, str] = {}
    went_through = True
    if not asked.table_only:
        done = {result["name"] for result in kept(meant, every)}
        wanted = [every[run.name] for run in meant if run.name not in done]
        sys.stderr.write(f"{len(done)} of {len(meant)} runs are done already\n")
        display = Display(len(wanted), failures)
        with display.shown():
            went_through = run_all(wanted, asked.jobs, display)
    publish(grid, kept(grid.runs, every), failures, asked.results or work, as_json=asked.json)
    return Interrupted.exit_code if not went_through else 1 if failures else 0


def kept(runs: Iterable[Run], every: Mapping[str, Job]) -> list[Json]:
    """The results there are; a recipe that is not valid has none, and fails where it is to be run."""
    results = []
    for run in runs:
        with suppress(SparsifyError):
            result = finished(run, every[run.name])
            results += [result] if result is not None else []
    return results


def publish(grid: Grid, results: Sequence[Json], failures: Collection[str], folder: Path, *, as_json: bool) -> None:
    """Print the table or the JSON, and write both."""
    whole = json.dumps(report(grid, results, failures), indent=1) + "\n"
    table = markdown(grid, results, failures)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{grid.name}.json").write_text(whole, encoding="utf-8")
    (folder / f"{grid.name}.md").write_text(table, encoding="utf-8")
    sys.stdout.write(whole if as_json else table)


if __name__ == "__main__":
    sys.exit(main())
