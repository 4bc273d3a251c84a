"""What makes inputs of raw examples, as it is deployed, and the proof that it gives what the data set gives."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify_deploy.errors import CheckFailed
from sparsify_deploy.preprocessing.spec import FILE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sparsify_deploy.stages.subject import Subject
    from sparsify_deploy.types import Arrays, DataSet, Json

OWN = "the data set does not say how a raw example becomes the inputs, so preprocessing is the user's own"


@dataclass(frozen=True)
class RawInputs:
    """A few test examples: `inputs` by the deployed preprocessing, from their raw form, `batch` by the data set."""

    kind: str
    inputs: Mapping[str, NDArray[Any]]
    batch: Arrays

    @property
    def examples(self) -> int:
        """How many there are."""
        return len(next(iter(self.inputs.values())))

    @property
    def facts(self) -> dict[str, Json]:
        """For a stage's record."""
        return {"kind": self.kind, "examples": self.examples}


def write_preprocessing(subject: Subject, folder: Path) -> RawInputs | None:
    """Write what the data set says of raw examples into the new `folder`, read it back, and put it to the test.

    None, and an empty folder, where the data set says nothing. Raises CheckFailed where a raw example does not become,
    bit for bit, what the data set gives the network; also where there is no raw example to try.
    """
    from sparsify_deploy.preprocessing.prepare import opened
    from sparsify_deploy.preprocessing.spec import read

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    examples: Any = subject.examples
    if (spec := getattr(examples, "preprocessing", None)) is None:
        return None
    raw: Mapping[int, Any] = getattr(examples, "raw", {})
    if not raw:
        raise CheckFailed(
            f"{FILE} cannot be tried: the data set has `preprocessing` and no `raw`: give a few raw test examples"
        )
    (folder / FILE).write_text(spec.to_text(), encoding="utf-8")
    for name, source in getattr(examples, "preprocessing_files", {}).items():
        shutil.copyfile(source, folder / name)
    names = [f"raw test example {index}" for index in raw]
    made = opened(read(folder / FILE), folder)(list(raw.values()), names)
    batch = _taken(subject.examples, list(raw))
    _check_same(made, {name: batch[name] for name in subject.examples.inputs}, list(raw))
    return RawInputs(spec.kind, made, batch)


def _taken(examples: DataSet, indices: list[int]) -> Arrays:
    import torch

    return {k: v.numpy() for k, v in examples.split("test").take(torch.tensor(indices)).items()}


def _check_same(made: Arrays, wanted: Arrays, indices: list[int]) -> None:
    import numpy as np

    if {*made} != {*wanted}:
        raise CheckFailed(
            f"{FILE} makes the inputs {', '.join(sorted(made))}, the data set {', '.join(sorted(wanted))}: "
            "correct the data set's `preprocessing`"
        )
    for name, values in wanted.items():
        if made[name].shape != values.shape or made[name].dtype != values.dtype:
            kinds = " and ".join(f"{each.dtype} {each.shape}" for each in (made[name], values))
            raise CheckFailed(
                f"{FILE} and the data set give {name} of {len(indices)} raw test examples as {kinds}: correct the data "
                "set's `preprocessing`"
            )
        wrong = [i for i, (a, b) in enumerate(zip(made[name], values, strict=True)) if not np.array_equal(a, b)]
        if wrong:
            largest = np.abs(made[name].astype(np.float64) - values.astype(np.float64)).max()
            raise CheckFailed(
                f"{FILE} makes another {name} than the data set of {len(wrong)} of {len(indices)} raw test "
                f"examples, the first being {indices[wrong[0]]} (largest difference {largest:.3g}): correct the data "
                "set's `preprocessing`"
            )
