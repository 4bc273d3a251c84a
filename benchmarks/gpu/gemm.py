"""2:4 matrix products with cuSPARSELt against dense ones, FP16 and INT8, in torch on a GPU.

Y (M, N) = X (M, K) W (N, K)^T for the layers of ResNet-50 (im2col; the 3-channel stem cannot be sparse) and of
BERT-base (128 tokens) at several batch sizes, and for squares. M is padded to a multiple of 32. Contestants take turns
and the dense one has two of them, the A/A control: dense; `to_sparse_semi_structured`; cuSPARSELt with the algorithm
that its own search likes best. Each turn replays a CUDA graph of many products between two events; operands rotate
over enough sets that they do not stay in the L2 cache. Before it is timed, every sparse product is compared with
the dense one, and that with float64 on a few rows.

    PYTHONPATH=.:benchmarks python -m gpu.gemm --out gemm.json [--budget-s 400]

`--device cpu --rehearse` goes the same way with tiny shapes and a dense product in place of the sparse one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from harness.ratio import median_ratio, race, ratio_text
from torch import Tensor
from torch.nn.functional import linear

from gpu.record import Record, Row, clocks, fingerprint, perform
from sparsify_deploy.errors import Interrupted, RuntimeUnavailable, SparsifyError
from sparsify_deploy.sparsity.nm import nm_mask

BATCHES = (32, 8, 1, 256)
_ROTATED_BYTES = 256 * 2**20
_MOST_SETS = 16
_PAD = 32
CONTROL, SPARSE, SEARCHED = "dense again", "sparse", "sparse, searched"


@dataclass(frozen=True)
class Shape:
    """M rows (pixels or tokens), N outputs, K inputs."""

    m: int
    n: int
    k: int

    @property
    def text(self) -> str:
        return f"M{self.m}xN{self.n}xK{self.k}"


@dataclass(frozen=True)
class Contestants:
    """What takes turns, each called with the number of an operand set, and how far sparse is from dense.

    `difference` is the relative Frobenius norm by contestant; INT8 has to be exact.
    """

    calls: Mapping[str, Callable[[int], Tensor]]
    sets: int
    difference: Mapping[str, float]
    note: str = ""


def shapes(batch: int) -> dict[str, list[Shape]]:
    """The distinct products of both networks at one batch size."""
    products = set()
    channels, side = 64, 56
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            products.add((side, width, channels))
            side //= stride
            products |= {(side, width, 9 * width), (side, 4 * width, width)}
            if not block:
                products.add((side, 4 * width, channels))
            channels = 4 * width
    resnet = {Shape(_padded(batch * s * s), n, k) for s, n, k in products} | {Shape(_padded(batch), 1000, 2048)}
    bert = {Shape(_padded(128 * batch), n, k) for n, k in ((768, 768), (3072, 768), (768, 3072))}
    return {name: sorted(found, key=lambda s: s.text) for name, found in (("resnet50", resnet), ("bert", bert))}


def _padded(rows: int) -> int:
    return -(-rows // _PAD) * _PAD


def sets_of(shape: Shape, bytes_each: int) -> int:
    """Operand sets that together exceed the L2 cache."""
    each = (shape.m * shape.k + shape.n * shape.k) * bytes_each
    return max(1, min(_MOST_SETS, -(-_ROTATED_BYTES // each)))


def fp16(shape: Shape, device: torch.device, *, stand_in: bool) -> Contestants:
    """Half precision; on the CPU float32."""
    dtype = torch.float32 if stand_in else torch.float16
    sets = sets_of(shape, dtype.itemsize)
    generator = torch.Generator(device).manual_seed(0)
    x = [torch.randn(shape.m, shape.k, generator=generator, device=device, dtype=dtype) for _ in range(sets)]
    w = [_pruned(torch.randn(shape.n, shape.k, generator=generator, device=device, dtype=dtype)) for _ in range(sets)]

    def dense(i: int) -> Tensor:
        return linear(x[i], w[i])

    if stand_in:
        calls: dict[str, Callable[[int], Tensor]] = {SPARSE: dense}
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls it a prototype
            packed = [torch.sparse.to_sparse_semi_structured(weight) for weight in w]
        raw = [torch._cslt_compress(weight) for weight in w]
        best = torch._cslt_sparse_mm_search(raw[0], x[0].t(), transpose_result=True)
        calls = {
            SPARSE: lambda i: linear(x[i], packed[i]),
            SEARCHED: lambda i: torch._cslt_sparse_mm(raw[i], x[i].t(), transpose_result=True, alg_id=best),
        }
    return _checked(dense, calls, sets, x[0], w[0], limit=5e-3, note="" if stand_in else f"algorithm {best}")


def int8(shape: Shape, device: torch.device, *, stand_in: bool) -> Contestants:
    """INT8 operands and INT32 sums; dense is `torch._int_mm`."""
    sets = sets_of(shape, 1)
    generator = torch.Generator(device).manual_seed(0)

    def random(rows: int) -> Tensor:
        return torch.randint(-127, 128, (rows, shape.k), generator=generator, device=device, dtype=torch.int8)

    x = [random(shape.m) for _ in range(sets)]
    w = [_pruned(random(shape.n)) for _ in range(sets)]

    def dense(i: int) -> Tensor:
        return torch._int_mm(x[i], w[i].t())

    if stand_in:
        calls: dict[str, Callable[[int], Tensor]] = {SPARSE: dense}
    else:
        raw = [torch._cslt_compress(weight) for weight in w]
        product = partial(torch._cslt_sparse_mm, out_dtype=torch.int32)
        best = torch._cslt_sparse_mm_search(raw[0], x[0].t(), out_dtype=torch.int32)
        # W X^T: whether cuSPARSELt turns the result while it writes INT32 differs between versions
        calls = {
            SPARSE: lambda i: product(raw[i], x[i].t()),
            SEARCHED: lambda i: product(raw[i], x[i].t(), alg_id=best),
        }
    return _checked(dense, calls, sets, x[0], w[0], limit=0.0, note="" if stand_in else f"algorithm {best}")


def _pruned(weight: Tensor) -> Tensor:
    """2:4 along K."""
    return weight * nm_mask(weight.float(), 2, 4).to(weight.dtype)


def _checked(
    dense: Callable[[int], Tensor],
    calls: Mapping[str, Callable[[int], Tensor]],
    sets: int,
    x: Tensor,
    w: Tensor,
    *,
    limit: float,
    note: str,
) -> Contestants:
    """Raises RuntimeUnavailable where a product is wrong: dense against float64, sparse against dense."""
    reference = dense(0)
    rows = min(16, len(x))
    exact = x[:rows].double().cpu() @ w.double().cpu().t()
    difference = {"dense": _far(reference[:rows].double().cpu(), exact)}
    for label, call in calls.items():
        found = call(0)
        ways = [each for each in (found, found.t()) if each.shape == reference.shape]
        difference[label] = min(_far(each.double(), reference.double()) for each in ways)
    if wrong := [label for label, value in difference.items() if not value <= limit]:
        raise RuntimeUnavailable(f"{wrong[0]}: differs by {difference[wrong[0]]:.2e}, more than {limit:.0e}")
    return Contestants({"dense": dense, CONTROL: dense, **calls}, sets, difference, note)


def _far(found: Tensor, reference: Tensor) -> float:
    return float((found - reference).norm() / reference.norm())


def on_gpu(call: Callable[[int], Tensor], sets: int, launches: int) -> Callable[[], float]:
    """Milliseconds of one product: a graph of `launches` of them between two events."""
    for i in range(sets):
        call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            call(i % sets)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

    def turn() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / launches

    for _ in range(3):
        turn()
    return turn


def on_cpu(call: Callable[[int], Tensor], sets: int, launches: int) -> Callable[[], float]:
    """Milliseconds of one product by the wall clock; for rehearsals."""

    def turn() -> float:
        began = time.perf_counter()
        for i in range(launches):
            call(i % sets)
        return (time.perf_counter() - began) * 1e3 / launches

    turn()
    return turn


def job(shape: Shape, kind: str, device: torch.device, *, rounds: int, rehearse: bool) -> Row:
    """One shape in one precision."""
    contestants = {"fp16": fp16, "int8": int8}[kind](shape, device, stand_in=rehearse)
    timer = on_cpu if device.type == "cpu" else on_gpu
    before = clocks()
    probe = timer(contestants.calls["dense"], contestants.sets, contestants.sets)()
    launches = contestants.sets * max(1, round(5.0 / max(probe, 1e-3) / contestants.sets))
    launches = min(launches, 1024) if not rehearse else contestants.sets
    turns = [timer(call, contestants.sets, launches) for call in contestants.calls.values()]
    rows = race(turns, rounds)
    labels = list(contestants.calls)
    return {
        "shape": {"m": shape.m, "n": shape.n, "k": shape.k},
        "precision": kind,
        "rehearsal": "dense stand-in for sparse, float32 for FP16" if rehearse else None,
        "sets": contestants.sets,
        "launches": launches,
        "rounds": rounds,
        "note": contestants.note,
        "difference": dict(contestants.difference),
        "ms": {label: statistics.median(row[i] for row in rows) for i, label in enumerate(labels)},
        "control": median_ratio(rows, 1, 0),
        "speedup": {label: median_ratio(rows, 0, i) for i, label in enumerate(labels) if i >= 2},
        "clocks_before": before,
        "clocks_after": clocks(),
    }


def shown(key: str, row: Row) -> str:
    """One line."""
    word = "rehearsal, " if row["rehearsal"] else ""
    ratios = "; ".join(f"dense / {label} {ratio_text(ratio)}" for label, ratio in row["speedup"].items())
    return f"{key}: {word}dense {row['ms']['dense']:.4f} ms; {ratios}; A/A {ratio_text(row['control'])}"


def run(asked: argparse.Namespace) -> int:
    """Measure what is missing. Raises RuntimeUnavailable without a GPU or without cuSPARSELt."""
    device = torch.device(asked.device)
    if not asked.rehearse:
        if device.type != "cuda" or not torch.cuda.is_available():
            raise RuntimeUnavailable("no NVIDIA GPU here that torch can use: --device cpu --rehearse goes through it")
        if not torch.backends.cusparselt.is_available():
            raise RuntimeUnavailable("this torch has no cuSPARSELt: install a CUDA build of torch 2.10 or newer")
    found = fingerprint("gemm", rehearsal=asked.rehearse, cuda=torch.version.cuda)
    if not asked.rehearse:
        found["cusparselt"] = torch.backends.cusparselt.version()
    meant: dict[str, Shape] = {}
    if asked.rehearse:
        meant = {"tiny": Shape(64, 32, 64), "tiny wide": Shape(32, 96, 128)}
    else:
        for batch in asked.batches:
            meant |= {f"{net}/b{batch}/{s.text}": s for net, each in shapes(batch).items() for s in each}
        meant |= {f"square/{side}": Shape(side, side, side) for side in (1024, 2048, 4096, 8192)}
    jobs = {
        f"{name}/{kind}": partial(job, shape, kind, device, rounds=asked.rounds, rehearse=asked.rehearse)
        for name, shape in meant.items()
        for kind in ("fp16", "int8")
    }
    return perform(Record(asked.out, found), jobs, budget_s=asked.budget_s, show=shown)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, 1 where a job failed, 75 where it was stopped, or that of the error, in one line."""
    from pathlib import Path

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the result file, gone on with where it exists")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, dense in place of sparse, marked so")
    parser.add_argument("--budget-s", type=float, help="begin no shape that would not end by then")
    try:
        return run(parser.parse_args(arguments))
    except KeyboardInterrupt:
        print("gpu.gemm: stopped; what was finished is kept", file=sys.stderr)
        return Interrupted.exit_code
    except SparsifyError as error:
        print(f"gpu.gemm: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
