"""Which files of the user a run would execute: Python files that a recipe names, and checkpoints that hold objects."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sparsify_deploy import menu
from sparsify_deploy.artifacts.fingerprint import file_digest
from sparsify_deploy.errors import DataError
from sparsify_deploy.recipe import CalibrationData, Data, Model, Recipe, TaskSection
from sparsify_deploy.safety import usercode

_NAMED = 3


@dataclass(frozen=True)
class UserCode:
    """A file, the field of the recipe that names it, and what of it would run."""

    section: str
    path: Path
    what: str

    def line(self) -> str:
        """What a person is to look at before trusting it: path, sha256 and field. `DataError` where it is gone."""
        return f"{self.section}: {self.path} (sha256 {self._digest()}) {self.what}"

    def approve(self) -> str:
        """The same, after which other bytes of the file than those of this sha256 are refused."""
        digest = self._digest()
        usercode.approve(self.path, digest)
        return f"{self.section}: {self.path} (sha256 {digest}) {self.what}"

    def _digest(self) -> str:
        """Of the bytes as they are now: a remembered digest goes by size and times."""
        try:
            return file_digest(self.path)
        except OSError as error:
            raise DataError(f"{self.section}: {self.path} cannot be read: {error.strerror or error}") from error


def user_code(recipe: Recipe) -> tuple[UserCode, ...]:
    """What would run of the user's; nothing is imported, and of a checkpoint the names of its objects are read."""
    return tuple(_files(recipe))


def _files(recipe: Recipe) -> Iterator[UserCode]:
    from_data = recipe.quantize.calibration_data if recipe.quantize is not None else None
    sections: dict[str, Model | Data | TaskSection | CalibrationData | None] = {
        "model": recipe.model,
        "data": recipe.data,
        "task": recipe.task if recipe.data is not None else None,
        "quantize.calibration_data": from_data,
    }
    for name, section in sections.items():
        if section is None:
            continue
        chosen, params = getattr(section, section.KEY), section.params
        entry = menu.entry(section.MENU, chosen)
        if entry.RUNS_USER_CODE:
            for path in entry.files(params).values():
                yield UserCode(f"{name}.{section.KEY} {chosen}", path, "is executed")
    teacher = recipe.distillation.teacher if recipe.distillation is not None else None
    for name, checkpoint in (("model.checkpoint", recipe.model.checkpoint), ("distillation.teacher", teacher)):
        if checkpoint is None:
            continue
        from sparsify_deploy.models._pickled import objects_in

        if objects := objects_in(checkpoint):
            more = ", ..." if len(objects) > _NAMED else ""
            yield UserCode(
                name, checkpoint, f"is unpickled with objects besides tensors: {', '.join(objects[:_NAMED])}{more}"
            )
