"""Are sparse kernels picked behind Q/DQ? The same 2:4 network with and without them (NVIDIA/TensorRT#4694).

Every variant of a network has the same weights. What the builder found eligible and what it picked is read from its
log, the kernels that ran from the profile; outputs are compared with the first variant's. Chains of equal layers come
first: they hold nothing but the question.

    PYTHONPATH=.:benchmarks python -m gpu.qdq --out qdq.json [--budget-s 500]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from gpu.engines import common, record_of, setting_of
from gpu.graphs import LAYERS_ALONE, Placement
from gpu.nets import Spec, write
from gpu.record import Row, perform
from gpu.variants import SPARSE, Setting, Variant, measure, summary
from sparsify_deploy.errors import Interrupted, SparsifyError

NETS = ("conv_chain", "linear_chain", "resnet50", "bert")
IMPLICIT = "2:4 INT8, no Q/DQ"
WITHOUT, OUTPUTS, ALONE = "2:4 FP16, no Q/DQ", f"{SPARSE}, outputs too", f"{SPARSE}, layers alone"
STREAM, INTEGERS, DENSE_KERNELS = f"{SPARSE}, stream too", f"{SPARSE}, stored integers", f"{SPARSE}, dense kernels"


def variants(net: str, scale: str, batch: int, folder: Path) -> tuple[Variant, ...]:
    """One network, six to eight ways; the last is the one that the package makes, without SPARSE_WEIGHTS."""

    def written(placement: Placement | None, *, integers: bool = False) -> Path:
        return write(Spec(net, scale, placement, sparse=True, integers=integers, batch=batch), folder)

    found = [
        Variant(WITHOUT, written(None), half=True),
        Variant(IMPLICIT, written(None), half=True, implicit=True),
        Variant(SPARSE, written(Placement()), half=True),
        Variant(OUTPUTS, written(Placement(outputs=True)), half=True),
        Variant(INTEGERS, written(Placement(), integers=True), half=True),
        Variant(DENSE_KERNELS, written(Placement()), half=True, kernels=False),
    ]
    if not net.endswith("chain"):
        found.insert(4, Variant(ALONE, written(LAYERS_ALONE), half=True))
    if net == "bert":
        found.insert(4, Variant(STREAM, written(Placement(stream=True)), half=True))
    return tuple(found)


def job(setting: Setting, net: str, scale: str, batch: int) -> Row:
    """One network at one batch size."""
    row = measure(setting, variants(net, scale, batch, setting.work / "nets"), batch)
    return {"net": net, "scale": scale, **row}


def run(asked: argparse.Namespace) -> int:
    """Measure what is missing."""
    setting, record = setting_of(asked), record_of("qdq", asked)
    jobs = {
        f"{net}/b{batch}": partial(job, setting, net, asked.scale, batch)
        for net in asked.nets
        for batch in asked.batches
    }
    return perform(record, jobs, budget_s=asked.budget_s, show=summary)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, 1 where a job failed, 75 where it was stopped, or that of the error, in one line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    common(parser)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--batches", type=int, nargs="+", default=[32])
    try:
        return run(parser.parse_args(arguments))
    except KeyboardInterrupt:
        print("gpu.qdq: stopped; what was finished is kept", file=sys.stderr)
        return Interrupted.exit_code
    except SparsifyError as error:
        print(f"gpu.qdq: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
