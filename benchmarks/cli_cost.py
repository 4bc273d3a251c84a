"""What the light verbs cost in CPU time as a share of `import torch`, and what a run with nothing to do costs.

Rounds are interleaved, the ratio is taken inside each round, and the median over rounds is compared with the limit.
`import torch` stands in each round twice: its ratio to itself is the noise floor.

    python benchmarks/cli_cost.py [--rounds 9] [--json FILE]

Exit code 1 where a limit is not kept.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLI = [sys.executable, "-m", "sparsify_deploy"]
TORCH = [sys.executable, "-c", "import torch"]
CONTROL = "import torch, again"
COMMANDS = {
    "import torch": TORCH,
    "--help": [*CLI, "--help"],
    "--version": [*CLI, "--version"],
    CONTROL: TORCH,
    "list": [*CLI, "list"],
    "validate": [*CLI, "validate", "recipes/digits.yaml"],
}
LIMITS = {"--help": 1 / 15, "--version": 1 / 15, "list": 1 / 4, "validate": 1 / 4}
AGAIN = "run, nothing to do"
AGAIN_LIMIT_MS = 500.0
"""Wall time of a run in which every step is cached."""


@dataclass(frozen=True)
class Cost:
    """Times of one command and the share of its CPU time of `import torch`'s; medians over rounds."""

    command: str
    cpu_ms: float
    wall_ms: float
    ratio: float
    lowest: float
    highest: float
    limit: float | None

    @property
    def kept(self) -> bool:
        if self.command == AGAIN:
            return self.wall_ms <= AGAIN_LIMIT_MS
        return self.limit is None or self.ratio <= self.limit


def times_ms(command: list[str]) -> tuple[float, float]:
    """User plus system CPU time of one child and its own children, and its wall time; raises where the child fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has its bytecode
    began = time.perf_counter()
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - began
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command)
    return 1e3 * (usage.ru_utime + usage.ru_stime), 1e3 * wall


def measure(rounds: int, run_dir: Path) -> list[Cost]:
    """Run every command once to warm the caches (the recipe's first run among them), then interleaved rounds."""
    commands = {**COMMANDS, AGAIN: [*CLI, "run", "recipes/smoke.yaml", "--run-dir", str(run_dir)]}
    for command in commands.values():
        times_ms(command)
    samples = [{name: times_ms(command) for name, command in commands.items()} for _ in range(rounds)]
    costs = []
    for name in commands:
        ratios = [sample[name][0] / sample["import torch"][0] for sample in samples]
        costs.append(
            Cost(
                command=name,
                cpu_ms=statistics.median(sample[name][0] for sample in samples),
                wall_ms=statistics.median(sample[name][1] for sample in samples),
                ratio=statistics.median(ratios),
                lowest=min(ratios),
                highest=max(ratios),
                limit=LIMITS.get(name),
            )
        )
    return costs


def table(costs: list[Cost]) -> str:
    """The costs as Markdown."""
    lines = [
        "| command | CPU, ms | wall, ms | share of `import torch` (CPU) | lowest to highest | limit | |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for cost in costs:
        limit = f"{AGAIN_LIMIT_MS:.0f} ms wall" if cost.command == AGAIN else f"{cost.limit:.3f}" if cost.limit else ""
        word = ("kept" if cost.kept else "NOT KEPT") if limit else ""
        spread = f"{cost.lowest:.3f} to {cost.highest:.3f}"
        figures = f"{cost.cpu_ms:.0f} | {cost.wall_ms:.0f} | {cost.ratio:.3f} | {spread}"
        lines.append(f"| `{cost.command}` | {figures} | {limit} | {word} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        costs = measure(options.rounds, Path(folder))
    print(table(costs))
    if options.json:
        python = ".".join(map(str, sys.version_info[:3]))
        result = {"python": python, "rounds": options.rounds, "costs": [asdict(cost) for cost in costs]}
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if all(cost.kept for cost in costs) else 1


if __name__ == "__main__":
    sys.exit(main())
