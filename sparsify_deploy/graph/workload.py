"""What each layer of a network computes and moves for one example, from shapes alone.

`Tally` holds the rules by which operators become layers, the same for a torch network and an ONNX file:

- a convolution or matrix product opens a layer; what is computed element by element from its output (activation,
  BatchNorm, residual add) fuses into it and costs only the bytes of what it reads besides;
- an add of two layers fuses into the one that runs last, a mask computed from the inputs into the other;
- product, softmax and product of an attention head are one layer, as fused attention kernels have it;
- normalisation that is spelled out, two reductions and what stands between them, is one layer;
- softmax alone, normalisation, pooling, embedding and all that is not known are layers of their own, without products;
- reshaping, transposing, slicing, concatenating, casting and Q/DQ cost nothing.

Nothing here imports onnx, so that workloads can be read back where there is none.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from math import prod

_ELEMENTWISE = "Elementwise"


@dataclass(frozen=True)
class Workload:
    """One layer, for one example: `macs` multiply-adds, elements `read` and `written`; `extra` are those of `read`
    that fused operators take besides the layer's own input.

    `shape` is that of the weight, `(K, C / groups, *kernel)`, `()` where there is none; `parameter` names it.
    """

    name: str
    op: str
    macs: int
    read: int
    written: int
    shape: tuple[int, ...] = ()
    groups: int = 1
    parameter: str = ""
    extra: int = 0

    @property
    def weights(self) -> int:
        """Elements of the weight."""
        return prod(self.shape) if self.shape else 0


@dataclass(frozen=True)
class _Value:
    """A tensor that depends on the input: the layer it comes out of, its elements, what holds its memory."""

    owner: _Layer | None
    elements: int
    roots: frozenset[Hashable]


@dataclass(eq=False)
class _Layer:
    name: str
    op: str
    order: int
    macs: int = 0
    shape: tuple[int, ...] = ()
    groups: int = 1
    parameter: str = ""
    reads: dict[Hashable, int] = field(default_factory=dict)
    own: dict[Hashable, int] = field(default_factory=dict)
    extra: int = 0
    closed: bool = False


class Tally:
    """Collects operators in the order they run. Values are known by keys; one never named is constant."""

    def __init__(self) -> None:
        self._values: dict[Hashable, _Value] = {}
        self._layers: list[_Layer] = []
        self._needed: set[Hashable] = set()

    def feed(self, key: Hashable, elements: int) -> None:
        """An input of the network."""
        self._values[key] = _Value(None, elements, frozenset((key,)))

    def live(self, keys: Iterable[Hashable]) -> list[Hashable]:
        """Those of `keys` that depend on the network's input, each once."""
        return [key for key in dict.fromkeys(keys) if key in self._values]

    def layer(
        self,
        name: str,
        op: str,
        inputs: Iterable[Hashable],
        outputs: Sequence[tuple[Hashable, int]],
        *,
        macs: int = 0,
        shape: tuple[int, ...] = (),
        groups: int = 1,
        parameter: str = "",
    ) -> None:
        """An operator that opens a layer, or joins the attention or normalisation it is part of."""
        sources = self.live(inputs)
        if not sources:
            return
        layer = self._joined(op, sources)
        if layer is None:
            layer = _Layer(name, op, len(self._layers), shape=shape, groups=groups, parameter=parameter)
            self._layers.append(layer)
        layer.macs += macs
        self._write(layer, sources, outputs)

    def pointwise(self, name: str, inputs: Iterable[Hashable], outputs: Sequence[tuple[Hashable, int]]) -> None:
        """An operator that works element by element: it fuses into the last layer it reads.

        What is computed from the network's inputs alone, a mask say, can run before any other layer, so it comes last.
        """
        sources = self.live(inputs)
        owners = [owner for key in sources if (owner := self._values[key].owner) is not None]
        if owners:
            last = max(owners, key=lambda layer: (layer.op != _ELEMENTWISE, layer.order))
            self._write(last, sources, outputs, fused=True)
        else:
            self.layer(name, _ELEMENTWISE, sources, outputs)

    def move(self, inputs: Iterable[Hashable], outputs: Sequence[tuple[Hashable, int]]) -> None:
        """An operator that only rearranges what it reads."""
        sources = [self._values[key] for key in self.live(inputs)]
        if not sources:
            return
        owner = max((v.owner for v in sources if v.owner), key=lambda layer: layer.order, default=None)
        roots = frozenset(root for value in sources for root in value.roots)
        for key, elements in outputs:
            self._values[key] = _Value(owner, elements, roots)

    def done(self, outputs: Iterable[Hashable]) -> tuple[Workload, ...]:
        """The layers, in order, once the network has returned `outputs`."""
        for key in self.live(outputs):
            self._needed |= self._values[key].roots
        return tuple(self._workload(layer) for layer in self._layers)

    def _joined(self, op: str, sources: Sequence[Hashable]) -> _Layer | None:
        """Softmax joins the product it reads, the next product both, a second reduction the first."""
        owners = [owner for key in sources if (owner := self._values[key].owner) is not None]
        joins = {"Softmax": "MatMul", "MatMul": "Attention", "Reduce": "Reduce"}.get(op)
        found = next((owner for owner in owners if owner.op == joins and not owner.closed), None)
        if found is not None and op == "Softmax":
            found.op = "Attention"
        elif found is not None:  # attention has two products, and normalisation two reductions
            found.closed = True
        return found

    def _write(
        self,
        layer: _Layer,
        sources: Iterable[Hashable],
        outputs: Sequence[tuple[Hashable, int]],
        *,
        fused: bool = False,
    ) -> None:
        for key in sources:
            value = self._values[key]
            if value.owner is layer:
                continue
            if fused and key not in layer.reads:
                layer.extra += value.elements
            layer.reads[key] = value.elements
            self._needed |= value.roots
        # What is computed from a part of the layer's own result, the queries' scale say, is written in its place.
        own = {self._values[key].roots for key in sources if fused and self._values[key].owner is layer}
        roots = own.pop() if len(own) == 1 else frozenset(sources)
        in_place = not roots <= {*sources}
        for key, elements in outputs:
            if in_place:
                self._values[key] = _Value(layer, elements, roots)
            else:
                self._values[key] = _Value(layer, elements, frozenset((key,)))
                layer.own[key] = elements

    def _workload(self, layer: _Layer) -> Workload:
        return Workload(
            name=layer.name,
            op=layer.op,
            macs=layer.macs,
            read=sum(layer.reads.values()),
            written=sum(elements for key, elements in layer.own.items() if key in self._needed),
            shape=layer.shape,
            groups=layer.groups,
            parameter=layer.parameter,
            extra=layer.extra,
        )
