"""Permute the channels of a network so that an N:M projection keeps more, and leave its outputs as they are.

Pool & Yu 2021, "Channel Permutations for N:M Sparsity". For every set of channels that move together, the input
channels of all layers to be projected are searched as one matrix, a row for each output channel and kernel position.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparsify_deploy.errors import CheckFailed, ModelError
from sparsify_deploy.sparsity import permute
from sparsify_deploy.sparsity.channels import channel_groups
from sparsify_deploy.types import Facts, Silent, outputs_of

if TYPE_CHECKING:
    from sparsify_deploy.sparsity.spaces import Axis, Channels, Segment, Space
    from sparsify_deploy.types import Batch, Outputs, Progress

_TOLERANCE = 1e-9
"""Largest difference of an output in float64, relative to the largest output."""


@dataclass(frozen=True)
class LayerRow:
    """What permuting did to a layer that will be projected; magnitudes are sums of |weight|.

    `kept_before` and `kept_after` are what N:M keeps, `ideal` what the largest n / m of each row would; `efficacy`
    is the part of the way from the first to the last. `reason` says why a layer was not permuted.
    """

    layer: str
    permuted: bool
    reason: str
    whole: float
    kept_before: float
    kept_after: float
    ideal: float
    efficacy: float


@dataclass(frozen=True)
class GroupRow:
    """Channels that share one permutation: who reads them (`layers`), their number, what the search gained."""

    layers: tuple[str, ...]
    channels: int
    permuted: bool
    kept_before: float
    kept_after: float


@dataclass(frozen=True)
class PermutationReport:
    """Every layer asked for, every group searched, and the masks in the new order.

    `masks` holds each mask given, as a bool tensor on the device it came on. `max_difference` is the largest
    difference of the outputs in float64, relative to the largest output.
    """

    layers: tuple[LayerRow, ...]
    groups: tuple[GroupRow, ...]
    max_difference: float
    masks: Mapping[str, Tensor] = field(repr=False)

    @property
    def permuted(self) -> int:
        """How many layers to be projected have another order now."""
        return sum(row.permuted for row in self.layers)

    def facts(self) -> Facts:
        """The report without the masks, as JSON."""
        before, after = (math.fsum(getattr(row, f"kept_{when}") for row in self.layers) for when in ("before", "after"))
        return {
            "permuted": self.permuted,
            "kept_before": before,
            "kept_after": after,
            "whole": math.fsum(row.whole for row in self.layers),
            "max_difference": self.max_difference,
            "layers": [asdict(row) for row in self.layers],
            "groups": [{**asdict(row), "layers": list(row.layers)} for row in self.groups],
        }


@torch.no_grad()
def permute_(  # noqa: PLR0917 - the last ones are given by name
    model: nn.Module,
    example: Batch,
    inputs: Sequence[str],
    layers: Collection[str],
    n: int,
    m: int,
    method: permute.Method = "channel_swap",
    masks: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
) -> PermutationReport:
    """Permute `model` in place so that n:m keeps more of the weights of `layers`, names of conv or linear layers.

    `example` should hold two examples or more, with fields `inputs` in the order of the network's arguments. `masks`,
    by parameter name, say which weights count; all of them come back in the new order. A set of channels is permuted
    only if the layers to be projected that read it keep more, in float64. The work is done on a float64 copy, whose
    outputs in eval mode are compared before the network itself is touched.

    Raises:
        ModelError: torch.fx cannot trace the network, it cannot run in float64, or a name in `layers` is not known.
        CheckFailed: the outputs would change; the network is as it was.
    """
    progress = progress or Silent()
    modules = dict(model.named_modules())
    for name in layers:
        if not isinstance(modules.get(name), (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
            raise ModelError(f"{name!r} is no conv or linear layer of the network: it cannot be permuted")
    network = copy.deepcopy(model).eval().double()
    batch = _as_double(example, inputs, model)
    before = _outputs(network, batch, inputs)
    channels = channel_groups(network, [batch[name] for name in inputs])
    trial = _Trial(network, {name: mask.clone() for name, mask in (masks or {}).items()}, channels.axes, n, m, method)
    start = {name: trial.measure(name) for name in layers}

    orders: dict[Space, Tensor] = {}
    groups = []
    searchable, reasons = _searchable(channels, layers, m)
    for index, (space, readers) in enumerate(searchable.items()):
        progress.update("permute channels", index, len(searchable), readers[0][0])
        row, order = trial.improve_(space, readers)
        groups.append(row)
        if order is not None:
            orders[space] = order
    progress.update("permute channels", len(searchable), len(searchable))

    difference = _compare(before, _outputs(network, batch, inputs))
    _apply_(_tensors(model), channels.axes, orders)
    permuted = {name for row in groups if row.permuted for name in row.layers}
    rows = []
    for name in sorted(layers, key=list(modules).index):
        reason = reasons.get(name, "" if name in permuted else "no order was found that keeps more")
        rows.append(_row(name, name in permuted, reason, start[name], trial.measure(name)))
    return PermutationReport(tuple(rows), tuple(groups), difference, trial.masks)


@dataclass(frozen=True)
class _Trial:
    """The float64 copy that orders are tried on, with the masks beside it."""

    network: nn.Module
    masks: dict[str, Tensor]
    axes: Sequence[Axis]
    n: int
    m: int
    method: permute.Method

    def improve_(self, space: Space, readers: Sequence[tuple[str, int]]) -> tuple[GroupRow, Tensor | None]:
        """Search one space and keep what was found if the layers that read it keep more."""
        names = tuple(dict.fromkeys(name for name, _ in readers))
        columns = [self.matrix(name)[:, offset : offset + space.size] for name, offset in readers]
        before = math.fsum(self.measure(name)[1] for name in names)
        order = permute.search(torch.cat(columns), self.n, self.m, self.method)
        self.apply_(space, order)
        after = math.fsum(self.measure(name)[1] for name in names)
        if after > before:
            return GroupRow(names, space.size, True, before, after), order
        self.apply_(space, order.argsort())
        return GroupRow(names, space.size, False, before, before), None

    def apply_(self, space: Space, order: Tensor) -> None:
        """Reorder one space in the network and in the masks."""
        _apply_(_tensors(self.network), self.axes, {space: order})
        _apply_(self.masks, self.axes, {space: order})

    def matrix(self, layer: str) -> Tensor:
        """Magnitudes of a layer's kept weights, `(K R S, C)`: the columns are its input channels."""
        weight = self.network.get_parameter(f"{layer}.weight").detach().abs()
        mask = self.masks.get(f"{layer}.weight")
        if mask is not None:
            weight = weight * mask.to(weight.device)
        return weight.movedim(1, -1).reshape(-1, weight.shape[1])

    def measure(self, layer: str) -> tuple[float, float, float]:
        """The magnitude of a layer's kept weights: all, what n:m keeps, and what no order can exceed."""
        matrix = self.matrix(layer)
        if matrix.shape[1] % self.m:
            raise ModelError(
                f"{layer} has {matrix.shape[1]} input channels, not a multiple of {self.m}: it cannot be projected"
            )
        return float(matrix.sum()), permute.kept(matrix, self.n, self.m), permute.ideal(matrix, self.n, self.m)


def _searchable(
    channels: Channels, layers: Collection[str], m: int
) -> tuple[dict[Space, list[tuple[str, int]]], dict[str, str]]:
    """Spaces to the (layer, first column) that read them in whole groups of m, and why a layer reads none such."""
    found: dict[Space, list[tuple[str, int]]] = {}
    reasons: dict[str, str] = {}
    for name in channels.reads.keys() | channels.unreadable.keys():
        if name not in layers:
            continue
        if name not in channels.reads:
            reasons[name] = channels.unreadable[name]
            continue
        offset, obstacles = 0, []
        for segment in channels.reads[name]:
            obstacle = _obstacle(segment, offset, m)
            if obstacle:
                obstacles.append(obstacle)
            offset += segment.length
        if len(obstacles) == len(channels.reads[name]):
            reasons[name] = obstacles[0]
    for name in (axis.name.removesuffix(".weight") for axis in channels.axes if axis.axis == 1):
        if name not in layers:
            continue
        offset = 0
        for segment in channels.reads[name]:
            if not _obstacle(segment, offset, m):
                found.setdefault(segment.space.root(), []).append((name, offset))
            offset += segment.length
    return found, reasons


def _obstacle(segment: Segment, offset: int, m: int) -> str:
    """Why an order of these channels cannot be searched, or ""."""
    space = segment.space.root()
    if space.frozen:
        return space.frozen
    if segment.width > 1:
        return f"each channel is {segment.width} consecutive features of a flattened map, which move together"
    if offset % m or space.size % m:
        return f"its {space.size} channels from {offset} on are not whole groups of {m}"
    return "" if space.size > m else f"its {m} channels are one group"


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    parameters = {name: p.data for name, p in model.named_parameters(remove_duplicate=False)}
    return parameters | dict(model.named_buffers(remove_duplicate=False))


def _apply_(tensors: Mapping[str, Tensor], axes: Sequence[Axis], orders: Mapping[Space, Tensor]) -> None:
    """Put every axis of `tensors` into the new order, in place; tensors that are not there are passed over."""
    for axis in axes:
        tensor = tensors.get(axis.name)
        if tensor is None or not any(s.space.root() in orders for s in axis.segments):
            continue
        parts, offset = [], 0
        for segment in axis.segments:
            order = orders.get(segment.space.root(), torch.arange(segment.space.size))
            within = torch.arange(segment.width, device=order.device)
            parts.append((offset + order[:, None] * segment.width + within).reshape(-1).to(tensor.device))
            offset += segment.length
        tensor.copy_(tensor.index_select(axis.axis, torch.cat(parts)))


def _row(
    name: str, permuted: bool, reason: str, start: tuple[float, float, float], end: tuple[float, float, float]
) -> LayerRow:
    whole, before, ideal = start
    possible = ideal - before
    gained = end[1] - before
    return LayerRow(name, permuted, reason, whole, before, end[1], ideal, gained / possible if possible > 0 else 0.0)


def _as_double(example: Batch, inputs: Sequence[str], model: nn.Module) -> dict[str, Tensor]:
    first = next(model.parameters(), None)
    device = first.device if first is not None else torch.device("cpu")
    values = {name: example[name].to(device) for name in inputs}
    return {name: value.double() if value.is_floating_point() else value for name, value in values.items()}


def _outputs(model: nn.Module, batch: Batch, inputs: Sequence[str]) -> Outputs:
    try:
        return outputs_of(model, batch, inputs)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{type(model).__name__} cannot be run in float64, which shows that permuting leaves its outputs alone: "
            f"{reason}; switch the permutation off"
        ) from error


def _compare(before: Outputs, after: Outputs) -> float:
    """The largest relative difference of two sets of outputs; CheckFailed above the tolerance."""
    largest = 0.0
    for name, value in before.items():
        if not isinstance(value, Tensor):
            raise ModelError(f"output {name} is a {type(value).__name__}, not a tensor: it cannot be compared")
        if not value.isfinite().all():
            raise CheckFailed(
                f"output {name} is not finite, so that permuting channels cannot be checked: mend the weights"
            )
        difference = float((after[name].double() - value.double()).abs().max()) if value.numel() else 0.0
        scale = float(value.double().abs().max()) if value.numel() else 0.0
        relative = difference / scale if scale else difference
        if not relative <= _TOLERANCE:
            raise CheckFailed(
                f"permuting channels would change output {name} by {relative:.2g} of its largest value (float64, at "
                f"most {_TOLERANCE:g}); the network is as it was: switch the permutation off and report the network"
            )
        largest = max(largest, relative)
    return largest
