"""Where the examples for calibration come from, where it is not the train split."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sparsify_deploy import menu
from sparsify_deploy.errors import DataError
from sparsify_deploy.recipe import CalibrationData, Quantize

if TYPE_CHECKING:
    from sparsify_deploy.types import DataSet, Split

_PLACE = "quantize.calibration_data"


def calibration_methods(section: Quantize) -> dict[str, int]:
    """The menu entry in use with its version, beside those of the subject."""
    data = section.calibration_data
    return {} if data is None else {f"datasets/{data.source}": menu.entry("datasets", data.source).VERSION}


def calibration_files(section: Quantize) -> dict[str, Path]:
    """The files that define the calibration data, beside those of the subject. Raises DataError."""
    data = section.calibration_data
    if data is None:
        return {}
    try:
        found: Mapping[str, Path] = menu.entry("datasets", data.source).files(data.params)
    except DataError as error:
        raise _renamed(error) from error
    return {f"calibration.{name}": path for name, path in found.items()}


def opened(data: CalibrationData, main: DataSet) -> tuple[Split, tuple[str, ...]]:
    """The examples, scaled as those of `main` are, and what a report must say of them. Raises DataError."""
    from sparsify_deploy.datasets._calibration import calibration_split

    try:
        found: DataSet = menu.entry("datasets", data.source).open(data.params)
        split = calibration_split(found, main)
    except DataError as error:
        raise _renamed(error) from error
    notes = (note.replace("data: the train split", "its one split") for note in getattr(found, "notes", ()))
    return split, (f"calibration draws from the {len(split):,} examples of {_PLACE}, not from the train split", *notes)


def _renamed(error: DataError) -> DataError:
    text = str(error).removeprefix("data: ").replace("data.params.", f"{_PLACE}.params.")
    return DataError(f"{_PLACE}: {text}")
