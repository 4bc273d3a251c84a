"""One engine for one runtime, from the branch's ONNX file, and its accuracy where it can run here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel

from sparsify_deploy import menu
from sparsify_deploy.stages.base import Estimate
from sparsify_deploy.stages.inference import run_all
from sparsify_deploy.stages.subject import Subject, unmet_packages
from sparsify_deploy.types import Context, Facts, Json


@dataclass(frozen=True)
class BuildEngine:
    """Build, write the metadata beside the engine, evaluate the test examples on it."""

    subject: Subject
    runtime: str
    params: BaseModel
    batch_size: int

    name: ClassVar[str] = "build_engine"
    version: ClassVar[int] = 1
    inputs: ClassVar[tuple[str, ...]] = ("onnx",)
    outputs: ClassVar[Mapping[str, str]] = {"engine": "engine"}

    @property
    def environment(self) -> tuple[str, ...]:
        return (self.runtime, "gpu")

    def methods(self) -> Mapping[str, int]:
        version: int = menu.entry("runtimes", self.runtime).VERSION
        return {**self.subject.methods(), f"runtimes/{self.runtime}": version}

    def files(self) -> Mapping[str, Path]:
        return self.subject.files()

    def unmet(self) -> Sequence[str]:
        reason = menu.entry("runtimes", self.runtime).unavailable_reason()
        return [*unmet_packages("build_engine", "torch"), *([f"{self.runtime}: {reason}"] if reason else [])]

    def preflight(self) -> None:
        """Nothing shows before its inputs are there."""

    def estimate(self) -> Estimate:
        return Estimate()

    def run(self, inputs: Mapping[str, Path], out: Path, context: Context) -> Facts:
        runtime = menu.entry("runtimes", self.runtime)
        folder = out / self.outputs["engine"]
        folder.mkdir(exist_ok=True)
        engine = engine_file(folder, self.runtime)
        notes = runtime.build(inputs["onnx"], engine, self.params)
        for warning in notes.warnings:
            context.progress.say(f"{self.runtime}: {warning}")
        facts: dict[str, Json] = {
            "build": dataclasses.asdict(notes),
            "bytes": sum((folder / name).stat().st_size for name in notes.files),
        }
        reason = runtime.cannot_run_reason()
        if reason is None:
            facts["metrics"] = self._evaluate(engine)
        else:
            facts["not_run"] = reason
            context.progress.say(f"{self.runtime}: built, not run here: {reason}")
        return facts

    def _evaluate(self, engine: Path) -> dict[str, float]:
        """The task's metrics over the whole test split, computed by the engine."""
        import torch

        runtime = menu.entry("runtimes", self.runtime)
        split = self.subject.examples.split("test")
        batch = {k: v.numpy() for k, v in split.take(torch.arange(len(split))).items()}
        with runtime.open(engine, self.params) as session:
            fixed = session.inputs[0].shape[0]
            size = fixed or self.batch_size
            inputs = {name: batch[name] for name in self.subject.examples.inputs}
            outputs = run_all(session, inputs, size, fixed=fixed is not None)
        return self.subject.opened_task.evaluate(outputs, batch)


def engine_file(folder: Path, runtime: str) -> Path:
    """Where a build stage's folder holds its engine."""
    return folder / f"model{menu.entry('runtimes', runtime).SUFFIX}"
