"""An ONNX file in a network's place: what the deploy half of a plan works on, with the recipe's data or without any."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparsify_deploy import menu
from sparsify_deploy.errors import DataError, ModelError
from sparsify_deploy.recipe import Data, Recipe
from sparsify_deploy.stages.predictions import file_layers, restored
from sparsify_deploy.stages.subject import Subject

if TYPE_CHECKING:
    from torch import Tensor

    from sparsify_deploy.prediction.roofline import Layer
    from sparsify_deploy.types import Arrays, DataSet, IOTensor, Split

NO_DATA = Data.model_construct(source="")
"""Stands for the data section of a recipe that has none."""

DRAWN = 32
"""Examples that are drawn where there are no data."""

_CASTS = {("float32", "float16"), ("int64", "int32"), ("float32", "float64"), ("int32", "int64")}
"""From the data's type to the file's, where a value keeps its meaning."""


@dataclass(frozen=True)
class Given(Subject):
    """The file of a recipe whose model source is onnx; its inputs name what it is fed.

    Without data the examples are drawn by shape and type, torch is not needed, and no metric is known.
    """

    @property
    def measured(self) -> bool:
        return bool(self.data.source)

    @property
    def packages(self) -> tuple[str, ...]:
        return ("torch",) if self.measured else ()

    @property
    def path(self) -> Path:
        """The file, where the user keeps it."""
        found: Path = self.model.params.path  # type: ignore[attr-defined]
        return found

    def methods(self) -> dict[str, int]:
        if self.measured:
            return super().methods()
        return {f"models/{self.model.source}": menu.entry("models", self.model.source).VERSION}

    def files(self) -> dict[str, Path]:
        if self.measured:
            return super().files()
        found = menu.entry("models", self.model.source).files(self.model.params)
        return {f"model.{name}": path for name, path in found.items()}

    @property
    def data_notes(self) -> tuple[str, ...]:
        return super().data_notes if self.measured else ()

    @cached_property
    def tensors(self) -> tuple[IOTensor, ...]:
        """What the file is fed. Raises ModelError where it is broken, or has no input with a batch axis."""
        from sparsify_deploy.graph import file

        found = file.inputs(file.load(self.path))
        if not found:
            raise ModelError(f"{self.path}: takes no input, so there is nothing to time or to compare")
        for tensor in found:
            if not tensor.shape:
                raise ModelError(f"{self.path}: input {tensor.name!r} is a scalar: each input needs a batch axis first")
        return found

    def layers(self) -> tuple[Layer, ...]:
        """The file's layers, as predictions take them."""
        from sparsify_deploy.graph import file
        from sparsify_deploy.graph.dequantized import is_quantised

        facts = {"workloads": file_layers(self.path, quantized=is_quantised(file.load(self.path)))}
        return restored(facts) or ()

    @cached_property
    def fixed_batch(self) -> int | None:
        """The batch size that the file is written for; None where it takes any."""
        sizes = {tensor.shape[0] for tensor in self.tensors} - {None}
        if len(sizes) > 1:
            raise ModelError(
                f"{self.path}: its inputs are written for different batch sizes, {sorted(map(str, sizes))}"
            )
        return next(iter(sizes), None)

    @cached_property
    def examples(self) -> DataSet:
        """The data under the file's own names and types, or examples that are drawn.

        Raises DataError where names, types or shapes are not those of the file's inputs.
        """
        if not self.measured:
            return Drawn(tuple(tensor.name for tensor in self.tensors))
        opened: DataSet = super().examples
        fields = self._fields(opened)
        casts = self._casts(opened, fields)
        if not casts and all(name == field for name, field in fields.items()):
            return opened
        return Renamed(opened, fields, casts)

    def test_arrays(self, count: int | None = None) -> Arrays:
        """The first `count` test examples, from the start again where there are fewer; None: all of them."""
        if self.measured:
            return super().test_arrays(count)
        from sparsify_deploy.runtimes import _tensors

        shapes = {tensor.name: (count or DRAWN, *self._example_shape(tensor)) for tensor in self.tensors}
        return _tensors.random_inputs(self.tensors, shapes)

    def _example_shape(self, tensor: IOTensor) -> tuple[int, ...]:
        """The shape of one drawn example: the file's, or that of `model.params.shapes`."""
        from sparsify_deploy.runtimes._tensors import fits, shape_text

        given: Mapping[str, tuple[int, ...]] = self.model.params.shapes  # type: ignore[attr-defined]
        names = [each.name for each in self.tensors]
        if unknown := [name for name in given if name not in names]:
            raise DataError(
                f"model.params.shapes: {self.path.name} has no input {unknown[0]!r}: it takes {_list(names)}"
            )
        shape = given.get(tensor.name)
        if shape is not None and not fits(shape, tensor.shape[1:]):
            wanted = shape_text(tensor.shape[1:])
            raise DataError(f"model.params.shapes.{tensor.name}: {shape_text(shape)} does not fit {wanted}")
        if shape is None and None in tensor.shape[1:]:
            sizes = ", ".join("?" if axis is None else str(axis) for axis in tensor.shape[1:])
            raise DataError(
                f"{self.path.name}: input {tensor.name!r} is {shape_text(tensor.shape)}, and without data nothing says "
                f"how long its free axes are: add a data section, or model.params.shapes {{{tensor.name}: [{sizes}]}}"
            )
        return shape or tuple(axis for axis in tensor.shape[1:] if axis is not None)

    def _fields(self, opened: DataSet) -> dict[str, str]:
        """The data's field for each input of the file: by name, or the only one for the only one."""
        names, fields = [tensor.name for tensor in self.tensors], list(opened.inputs)
        if len(names) == len(fields) == 1:
            return {names[0]: fields[0]}
        if {*names} != {*fields}:
            raise DataError(
                f"{self.path.name} takes {_list(names)} and data.source {self.data.source} gives {_list(fields)}: "
                "the names must be the same, but where there is one of each; rename one side"
            )
        return {name: name for name in names}

    def _casts(self, opened: DataSet, fields: Mapping[str, str]) -> dict[str, str]:
        """The inputs whose type the data must be turned into."""
        import torch

        from sparsify_deploy.runtimes._tensors import fits, shape_text

        test = opened.split("test")
        first = test.take(torch.arange(min(1, len(test))))
        casts = {}
        for tensor in self.tensors:
            if tensor.name != fields[tensor.name] and tensor.name in first:
                raise DataError(
                    f"{self.path.name}: its input is called {tensor.name!r}, a field of the data that is none"
                )
            values = first[fields[tensor.name]].numpy()
            what = f"{self.path.name}: input {tensor.name!r}"
            if not fits(values.shape[1:], tensor.shape[1:]):
                gives = shape_text((None, *values.shape[1:]))
                raise DataError(
                    f"{what} takes {shape_text(tensor.shape)} and the data gives {gives}: "
                    "change data.params, or export the file for this shape"
                )
            if values.dtype.name == tensor.dtype:
                continue
            if (values.dtype.name, tensor.dtype) not in _CASTS:
                raise DataError(
                    f"{what} takes {tensor.dtype} and the data gives {values.dtype.name}: change data.params"
                )
            casts[tensor.name] = tensor.dtype
        return casts


@dataclass(frozen=True)
class Drawn:
    """A data set that holds nothing: its inputs' names are all that is known."""

    inputs: tuple[str, ...]
    classes: None = None

    def split(self, name: str) -> Split:
        """There is none."""
        raise DataError("the recipe has no data section: add one for what needs examples")


@dataclass(frozen=True)
class Renamed:
    """A data set under the names and types of a file's inputs; all else is the data set's own."""

    opened: DataSet
    names: Mapping[str, str]
    casts: Mapping[str, str]

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(self.names)

    @property
    def classes(self) -> tuple[str, ...] | None:
        return self.opened.classes

    @property
    def preprocessing(self) -> Any:
        """The data's own for the new name; None where types change or the kind has fixed names."""
        spec = getattr(self.opened, "preprocessing", None)
        if spec is None or self.casts or len(self.names) > 1:
            return None
        (name,) = self.names
        if spec.kind == "image":
            return replace(spec, input=name)
        return replace(spec, inputs=(replace(spec.inputs[0], name=name),)) if spec.kind == "array" else None

    @property
    def dynamic_axes(self) -> Mapping[str, Mapping[int, str]]:
        axes = getattr(self.opened, "dynamic_axes", {})
        return {name: axes[field] for name, field in self.names.items() if field in axes}

    def split(self, name: Literal["train", "test", "validation"]) -> Split:
        return _RenamedSplit(self.opened.split(name), self.names, self.casts)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.opened, name)


@dataclass(frozen=True)
class _RenamedSplit:
    opened: Split
    names: Mapping[str, str]
    casts: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.opened)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.opened, name)

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        import torch

        batch = dict(self.opened.take(indices))
        taken = {name: batch.pop(field) for name, field in self.names.items()}
        return {**batch, **{k: v.to(getattr(torch, self.casts[k])) if k in self.casts else v for k, v in taken.items()}}


def given(recipe: Recipe) -> Given:
    """What a recipe with model source onnx works on."""
    return Given(recipe.model, recipe.data or NO_DATA, recipe.task, recipe.seed)


def _list(names: list[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
