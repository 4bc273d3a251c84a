"""The verb that puts raw examples, files or texts, through a deployed model. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify_deploy import menu
from sparsify_deploy.errors import DataError, UsageError
from sparsify_deploy.preprocessing.spec import ArraySpec, ImageSpec, Raw, Spec, TextSpec
from sparsify_deploy.process import native
from sparsify_deploy.reporting.package import Package, check_runs
from sparsify_deploy.reporting.package import read as read_package
from sparsify_deploy.reporting.table import Table

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ask = Callable[[Raw, str], dict[str, NDArray[Any]]]

_ARRAYS = (".npy", ".npz")
_TAKES = {"image": "image files (PNG, JPEG, ...)", "text": "texts: --text, or .txt files with one a line"}


@dataclass(frozen=True)
class Guess:
    """A class with its probability, the softmax of its logit among all; `name` "" where classes have none."""

    index: int
    name: str
    probability: float


@dataclass(frozen=True)
class Answer:
    """What the model says to one example: its likeliest classes, or its outputs where it is no classifier."""

    example: str
    guesses: tuple[Guess, ...] | None
    outputs: Mapping[str, Any] | None


@dataclass(frozen=True)
class Predicted:
    """The answers, and the model they are from."""

    package: Path
    model: str
    runtime: str
    answers: tuple[Answer, ...]
    failed: tuple[str, ...] = ()
    """Why the others have no answer, a line an example."""

    def check(self) -> None:
        """Raises DataError, a line for each example that has no answer."""
        if self.failed:
            raise DataError(*self.failed)


def predict(
    folder: Path,
    files: Sequence[Path],
    texts: Sequence[str],
    *,
    top: int = 5,
    threads: int = 1,
    trust: bool = False,
    keep_going: bool = False,
) -> Predicted:
    """Preprocess each example as the package says and run the engine on it, one after another.

    With `keep_going` an example that cannot be read or taken is left to `Predicted.check`, unless no example can.

    Raises DataError for a folder that holds no package and for an example that the model cannot take, CorruptArtifact
    where a file of the package is not the one it lists, RuntimeUnavailable where its runtime cannot run here, and
    UsageError where its engine is code that was built elsewhere, unless they `trust` it.
    """
    from sparsify_deploy.runtimes._metadata import check_own

    package = read_package(folder)
    if package.spec is None:
        raise DataError(
            f"{folder}: says nothing of how raw examples become inputs, because the data set did not: open "
            f"{package.engine.name} with {package.runtime} and feed it inputs of your own"
        )
    examples = _examples(package.spec, files, texts)
    check_own(package.engine, trust=trust)
    check_runs(package)
    with opened(package, threads) as ask:
        answers: list[Answer] = []
        failed: list[str] = []
        for name, example in examples:
            try:
                if isinstance(example, DataError):
                    raise example
                answers.append(_answer(package, name, ask(example, name), top))
            except DataError as error:
                if not keep_going:
                    raise
                failed += error.lines
    found = Predicted(folder, package.note["model"], package.runtime, tuple(answers), tuple(failed))
    if not answers:
        found.check()
    return found


def table(found: Predicted) -> Table:
    """One row a class, or one an output, of each example."""
    rows: list[tuple[str, ...]] = []
    for answer in found.answers:
        shown = answer.example
        for guess in answer.guesses or ():
            rows.append((shown, guess.name or str(guess.index), str(guess.index), f"{guess.probability:.4f}"))
            shown = ""
        for name, value in (answer.outputs or {}).items():
            rows.append((shown, name, _values(value)))
            shown = ""
    title = f"{found.package}: {found.model} in {found.runtime}"
    if any(answer.guesses is None for answer in found.answers):
        return Table(title, ("example", "output", "values"), tuple(rows), "The engine's outputs as they are.")
    how = "Probability: softmax of the engine's logits over all classes; trained networks are often too sure."
    return Table(title, ("example", "class", "index", "probability"), tuple(rows), how)


def _values(value: Any) -> str:
    """Numbers with six digits, the first eight of many."""
    if not isinstance(value, list):
        return f"{value:.6g}"
    return f"[{', '.join(map(_values, value[:8]))}{', ...' if len(value) > 8 else ''}]"


@contextmanager
def opened(package: Package, threads: int = 1) -> Iterator[Ask]:
    """What gives the engine's outputs `(1, ...)` for a raw example and the name that errors call it by."""
    import numpy as np

    from sparsify_deploy.preprocessing.prepare import opened as preparing

    assert package.spec is not None
    prepare = preparing(package.spec, package.folder)
    runtime = menu.entry("runtimes", package.runtime)
    with runtime.open(package.engine, package.params, threads=threads) as session:
        size = next((tensor.shape[0] for tensor in session.inputs if tensor.shape), None) or 1

        def ask(example: Raw, name: str) -> dict[str, NDArray[Any]]:
            inputs = prepare([example], [name])
            whole = {key: np.repeat(values, size, axis=0) for key, values in inputs.items()}
            return {key: values[:1] for key, values in native.answer(session, whole).items()}

        yield ask


def raw_examples(spec: Spec, files: Sequence[Path], texts: Sequence[str]) -> Iterator[tuple[str, Raw]]:
    """What the user gave, with the name to show for each; files are judged at once and read one at a time.

    Raises DataError and UsageError.
    """

    def read(example: Raw | DataError) -> Raw:
        if isinstance(example, DataError):
            raise example
        return example

    return ((name, read(example)) for name, example in _examples(spec, files, texts))


def _examples(spec: Spec, files: Sequence[Path], texts: Sequence[str]) -> Iterator[tuple[str, Raw | DataError]]:
    """The same, with the error in the place of what cannot be read."""
    takes = _takes(spec)
    if not files and not texts:
        raise UsageError(f"nothing to predict: this model takes {takes}")
    if texts and not isinstance(spec, TextSpec):
        raise UsageError(f"--text: this model takes {takes}")
    first: list[tuple[str, Raw | DataError]] = [(_shown(text), _text(spec, text, "--text")) for text in texts]
    for path in files:
        if not path.is_file():
            raise DataError(f"{path}: {'is a folder: name the files in it' if path.is_dir() else 'no such file'}")
        wanted = {"text": (".txt",), "array": _ARRAYS}.get(spec.kind)
        suffix = path.suffix.lower()
        if (wanted is not None and suffix not in wanted) or (wanted is None and suffix in (".txt", *_ARRAYS)):
            raise DataError(f"{path}: this model takes {takes}")
    return chain(first, (example for path in files for example in _readable(spec, path)))


def _takes(spec: Spec) -> str:
    if isinstance(spec, ArraySpec):
        names = ", ".join(each.name for each in spec.inputs)
        kind = ".npy files" if len(spec.inputs) == 1 else f".npz files with {names}"
        return f"{kind}, each {spec.example}" if spec.example else kind
    return _TAKES[spec.kind]


def _readable(spec: Spec, path: Path) -> list[tuple[str, Raw | DataError]]:
    try:
        return [*_of_file(spec, path)]
    except DataError as error:
        return [(str(path), error)]


def _of_file(spec: Spec, path: Path) -> list[tuple[str, Raw]]:
    try:
        if isinstance(spec, ImageSpec):
            return [(str(path), path.read_bytes())]
        if isinstance(spec, TextSpec):
            lines = path.read_text(encoding="utf-8").split("\n")
            found = [
                (f"{path}:{i}: {_shown(line)}", _text(spec, line, f"{path}:{i}"))
                for i, line in enumerate(lines, 1)
                if line.strip()
            ]
        else:
            return [(str(path), _arrays(path))]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is no text in UTF-8 (byte {error.start})") from error
    if not found:
        raise DataError(f"{path}: holds no text")
    return found


def _text(spec: Spec, text: str, where: str) -> Raw:
    """One text, or the two of a pair with a tab between them."""
    assert isinstance(spec, TextSpec)
    if not spec.pair:
        return text
    first, tab, second = text.partition("\t")
    if not tab:
        raise DataError(f"{where}: this model takes pairs of texts: put a tab between the two")
    return first, second


def _arrays(path: Path) -> Raw:
    from sparsify_deploy.preprocessing.arrays import Archive, UnreadableArray, array, is_archive

    try:
        with path.open("rb") as file:
            if not is_archive(file):
                return array(file)
            found = Archive(file)
            return {name: found.read(name) for name in found.names}
    except UnreadableArray as error:
        raise DataError(f"{path}: is no array of numbers, or is damaged ({error})") from error


def _shown(text: str) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= 60 else plain[:57] + "..."


def _answer(package: Package, name: str, outputs: Mapping[str, NDArray[Any]], top: int) -> Answer:
    """The likeliest classes of a classifier, else every output as it is."""
    from sparsify_deploy.tasks._fields import chosen_output

    task = package.note["task"]
    if task["name"] != "classification":
        return Answer(name, None, {key: values[0].tolist() for key, values in outputs.items()})
    return Answer(name, likeliest(chosen_output(outputs, task.get("output"))[0], _classes(package), top), None)


def likeliest(logits: NDArray[Any], names: Sequence[str], top: int) -> tuple[Guess, ...]:
    """The `top` classes of logits `(classes,)`, the likeliest first; ties: the lower index first."""
    import numpy as np

    if logits.ndim != 1 or not np.isfinite(logits).all():
        raise DataError(f"the engine's logits are of shape {logits.shape} or not finite: it is no classifier's answer")
    wide = np.exp(logits.astype(np.float64) - logits.max())
    shares = wide / wide.sum()
    named = names if len(names) == len(logits) else [""] * len(logits)
    return tuple(Guess(int(i), named[i], float(shares[i])) for i in np.argsort(-shares, kind="stable")[:top])


def _classes(package: Package) -> Sequence[str]:
    return (package.spec.classes if package.spec is not None else None) or ()
