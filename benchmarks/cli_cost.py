"""What the light verbs cost, as a share of `import torch`, in CPU time of child processes.

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


@dataclass(frozen=True)
class Cost:
    """CPU time of one command and its share of `import torch`; medians over rounds."""

    command: str
    cpu_ms: float
    ratio: float
    lowest: float
    highest: float
    limit: float | None

    @property
    def kept(self) -> bool:
        return self.limit is None or self.ratio <= self.limit


def cpu_ms(command: list[str]) -> float:
    """User plus system CPU time of one child and its own children, ms; raises where the child fails."""
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command)
    return 1e3 * (usage.ru_utime + usage.ru_stime)


def measure(rounds: int) -> list[Cost]:
    """Run every command once to warm the file cache, then `rounds` interleaved rounds."""
    for command in COMMANDS.values():
        cpu_ms(command)
    samples = [{name: cpu_ms(command) for name, command in COMMANDS.items()} for _ in range(rounds)]
    costs = []
    for name in COMMANDS:
        ratios = [sample[name] / sample["import torch"] for sample in samples]
        costs.append(
            Cost(
                command=name,
                cpu_ms=statistics.median(sample[name] for sample in samples),
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
        "| command | CPU, ms | share of `import torch` | lowest to highest | limit | |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for cost in costs:
        limit, word = (f"{cost.limit:.3f}", "kept" if cost.kept else "NOT KEPT") if cost.limit else ("", "")
        spread = f"{cost.lowest:.3f} to {cost.highest:.3f}"
        lines.append(f"| `{cost.command}` | {cost.cpu_ms:.0f} | {cost.ratio:.3f} | {spread} | {limit} | {word} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    costs = measure(options.rounds)
    print(table(costs))
    if options.json:
        python = ".".join(map(str, sys.version_info[:3]))
        result = {"python": python, "rounds": options.rounds, "costs": [asdict(cost) for cost in costs]}
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if all(cost.kept for cost in costs) else 1


if __name__ == "__main__":
    sys.exit(main())
