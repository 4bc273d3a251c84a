"""Which weights are kept, as an immutable mapping from parameter name to a bool tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from sparsify_deploy.errors import DataError, ModelError
from sparsify_deploy.safety import regular

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from sparsify_deploy.sparsity.layers import Layer


class Mask(Mapping[str, "Tensor"]):
    """Parameter name (`layer1.0.conv1.weight`) to a bool tensor of its shape on the CPU; True keeps the weight.

    A layer that is not in the mask is dense and not counted. Names iterate in sorted order, so two equal masks
    are alike in every respect, their bytes on disk included. Tensors are cloned on the way in and on the way
    out: writing into one never changes a mask. Raises TypeError on a tensor that is not bool.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if tensor.dtype != torch.bool:
                raise TypeError(f"the mask of {name} is {tensor.dtype}, not bool")
        self._tensors = {
            name: tensors[name].detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name in sorted(tensors)
        }

    @classmethod
    def ones(cls, layers: Iterable[Layer]) -> Mask:
        """The mask that keeps every weight of `layers`."""
        return cls({layer.parameter: torch.ones(layer.weight.shape, dtype=torch.bool) for layer in layers})

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        return self._tensors.keys() == other._tensors.keys() and all(
            torch.equal(tensor, other._tensors[name]) for name, tensor in self._tensors.items()
        )

    __hash__ = None  # type: ignore[assignment]  # comparing reads every weight; nobody should do it by accident

    def __repr__(self) -> str:
        return f"Mask({len(self)} layers, density {self.density:.4f})"

    def counts(self) -> dict[str, tuple[int, int]]:
        """Parameter name to (kept, total) weights."""
        return {name: (int(np.count_nonzero(tensor.numpy())), tensor.numel()) for name, tensor in self._tensors.items()}

    def densities(self) -> dict[str, float]:
        """Parameter name to the fraction kept."""
        return {name: kept / total for name, (kept, total) in self.counts().items()}

    @property
    def density(self) -> float:
        """Kept weights over all weights of the layers in the mask; 1.0 for a mask without layers."""
        counts = self.counts().values()
        total = sum(total for _, total in counts)
        return sum(kept for kept, _ in counts) / total if total else 1.0

    def with_(self, changes: Mapping[str, Tensor]) -> Mask:
        """This mask with other tensors for some of its layers; ModelError on a new name or another shape."""
        for name, tensor in changes.items():
            if name not in self._tensors:
                raise ModelError(f"{name} is not in the mask; add layers by making a new mask")
            if tensor.shape != self._tensors[name].shape:
                raise ModelError(_shape_message(name, self._tensors[name].shape, tensor.shape))
        return Mask({**self._tensors, **changes})

    def moves_to(self, other: Mask) -> Iterator[tuple[str, NDArray[np.intp], NDArray[np.bool_]]]:
        """By layer, the flat positions at which `other`, a mask of the same layers, differs, and which it keeps."""
        for name, tensor in self._tensors.items():
            new = other._tensors[name]
            # numpy finds positions in a mask several times faster than torch does
            where = np.flatnonzero((new ^ tensor).numpy())
            yield name, where, new.view(-1).numpy().take(where)

    def save(self, path: Path) -> None:
        """Write a safetensors file of one byte a weight; equal masks give equal bytes."""
        path.write_bytes(save(self._tensors))

    @classmethod
    def load(cls, path: Path) -> Mask:
        """Read what `save` wrote; DataError where the file is missing or is not a mask."""
        try:
            tensors = load(regular.read(path))
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} cannot be read as a mask: {error}") from error
        wrong = [name for name, tensor in tensors.items() if tensor.dtype != torch.bool]
        if wrong:
            raise DataError(f"{path} is not a mask: {wrong[0]} is {tensors[wrong[0]].dtype}, not bool")
        return cls(tensors)

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Set every pruned weight of `model` to +0.0 in place; ModelError where name or shape does not fit."""
        for _, weight, tensor in self._pairs(model):
            weight.masked_fill_(~tensor.to(weight.device), 0.0)

    def check_holds(self, model: nn.Module) -> tuple[str, ...]:
        """Names of the parameters of `model` that have a pruned weight which is not zero (NaN is not)."""
        return tuple(
            name
            for name, weight, tensor in self._pairs(model)
            if bool((weight.detach().ne(0) & ~tensor.to(weight.device)).any())
        )

    def _pairs(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, tensor in self._tensors.items():
            if name not in parameters:
                raise ModelError(f"the mask has {name}, which the model lacks: it was made for another model")
            if parameters[name].shape != tensor.shape:
                raise ModelError(_shape_message(name, parameters[name].shape, tensor.shape))
            yield name, parameters[name], tensor


def _shape_message(name: str, expected: torch.Size, got: torch.Size) -> str:
    return f"{name} has shape {tuple(expected)}, its mask {tuple(got)}: it was made for another model"
