"""Which weights of a network may be pruned: those of Conv and Linear layers."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn
from torch.nn.parameter import UninitializedParameter

from sparsify_deploy.errors import ModelError

_PRUNABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass(frozen=True, eq=False)
class Layer:
    """A prunable layer: module `name`, `parameter` (`name.weight`), and its live `weight`.

    A conv weight is `(K, C / groups, *kernel)`, a linear weight `(out, in)`; `groups` is 1 for linear.
    """

    name: str
    parameter: str
    kind: Literal["conv", "linear"]
    weight: nn.Parameter
    groups: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        return tuple(self.weight.shape)


def prunable(model: nn.Module) -> tuple[Layer, ...]:
    """The Conv1d/2d/3d and Linear layers of `model` with their subclasses, in module order.

    A weight shared by several such layers appears once, under its first name; one shared with any other module
    (an embedding, say) not at all, for pruning it would prune that module too. Transposed convolutions,
    biases, normalisation and embeddings are never prunable. ModelError where a weight is computed
    (parametrised, weight-normalised) or not initialised yet (lazy).
    """
    modules = dict(model.named_modules())
    foreign = {id(p) for m in modules.values() if not isinstance(m, _PRUNABLE) for p in m.parameters(recurse=False)}
    layers: list[Layer] = []
    seen: set[int] = set()
    for name, module in modules.items():
        if not isinstance(module, _PRUNABLE):
            continue
        weight = module._parameters.get("weight")
        if weight is None:
            raise ModelError(f"{name or 'the model'} computes its weight (parametrised or weight-normalised): undo it")
        if isinstance(weight, UninitializedParameter):
            raise ModelError(f"{name or 'the model'} is lazy and has no weight yet: run one batch through it first")
        if id(weight) in seen or id(weight) in foreign:
            continue
        seen.add(id(weight))
        parameter = f"{name}.weight" if name else "weight"
        if isinstance(module, nn.Linear):
            layers.append(Layer(name, parameter, "linear", weight, 1))
        else:
            layers.append(Layer(name, parameter, "conv", weight, module.groups))
    return tuple(layers)


def to_prune(model: nn.Module, keep_dense: Iterable[str], field: str) -> tuple[Layer, ...]:
    """The prunable layers of `model` that none of the shell patterns `keep_dense` names; `field` as for `select`."""
    layers = prunable(model)
    dense = select(layers, keep_dense, field)
    return tuple(layer for layer in layers if layer.name not in dense)


def select(layers: Iterable[Layer], patterns: Iterable[str], field: str = "") -> set[str]:
    """Names of the layers (module names, as in `Layer.name`) that match any of the shell `patterns`.

    `*` matches dots too: `layer4.*` is all of layer4. ModelError for a pattern that matches no layer; it names `field`,
    where the patterns stand in the recipe.
    """
    names = [layer.name for layer in layers]
    chosen: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            close = difflib.get_close_matches(pattern, names, n=1, cutoff=0.6)
            hint = f"did you mean {close[0]!r}?" if close else f"layers are {', '.join(names) or 'none'}"
            where = f"{field}: " if field else ""
            raise ModelError(f"{where}{pattern!r} matches no prunable layer; {hint}")
        chosen |= matched
    return chosen
