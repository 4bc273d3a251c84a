"""What the pipeline asks of a stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

from sparsify_deploy.types import Context, Facts


@dataclass(frozen=True)
class Estimate:
    """What a stage is expected to cost, known before it runs; None where a figure has no meaning."""

    optimizer_steps: int | None = None
    training_flops: float | None = None


@runtime_checkable
class Stage(Protocol):
    """A frozen dataclass whose fields are all the settings that may change its result.

    `inputs` are the logical names it takes where the plan has them; `outputs` maps a logical name to a file or folder
    it leaves in `out`. `environment` lists the facts of the machine that its result depends on, by their names in
    `artifacts.environment`.
    """

    name: ClassVar[str]
    version: ClassVar[int]

    @property
    def inputs(self) -> tuple[str, ...]: ...

    @property
    def outputs(self) -> Mapping[str, str]: ...

    @property
    def environment(self) -> tuple[str, ...]: ...

    def methods(self) -> Mapping[str, int]:
        """The menu entries it uses, as `menu/name`, with their VERSION."""
        ...

    def files(self) -> Mapping[str, Path]:
        """The files it reads besides its inputs; they enter the fingerprint by content."""
        ...

    def unmet(self) -> Sequence[str]:
        """What this machine lacks to run it, one line each with what to install; found without importing torch."""
        ...

    def preflight(self) -> None:
        """Raise, before any stage runs, what is wrong with the network or the settings and shows without training."""
        ...

    def estimate(self) -> Estimate:
        """What it will cost. May import torch and open the data."""
        ...

    def run(self, inputs: Mapping[str, Path], out: Path, context: Context) -> Facts:
        """Do the work in the folder `out`, which survives a crash, and return what was measured."""
        ...
