"""ResNet-50, a BERT-base encoder and the result of a run, in FP32, FP16, dense INT8 and 2:4 INT8, interleaved.

Each job is one network at one batch size: its variants are built for that batch, raced with an A/A control, and
profiled layer by layer. Jobs whose row is in the result file are skipped; `--budget-s` ends the call in time.

    PYTHONPATH=.:benchmarks python -m gpu.engines --out engines.json [--run runs/cifar10] [--budget-s 500]

`--runtime openvino` or `onnxruntime` with `--scale small` rehearses it on a CPU; its rows are marked as rehearsal.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from gpu.graphs import Placement
from gpu.nets import Spec, store_float_weights_, without_qdq, write
from gpu.record import Record, Row, fingerprint, perform
from gpu.variants import DENSE, FP16, FP32, SPARSE, Setting, Variant, measure, summary
from sparsify_deploy import menu
from sparsify_deploy.errors import DataError, Interrupted, RuntimeUnavailable, SparsifyError, UsageError
from sparsify_deploy.graph import file
from sparsify_deploy.graph.shapes import workloads

ORDER = (32, 8, 1, 256)
"""Batch sizes, the one that the targets speak of first."""


def of_net(net: str, scale: str, batch: int, folder: Path) -> tuple[Variant, ...]:
    """The four variants of a generated network; INT8 weights lie in the file as floats, which 8.6 is sure to read."""
    dense = write(Spec(net, scale, batch=batch), folder)
    placed = Placement()
    return (
        Variant(FP32, dense, half=False),
        Variant(FP16, dense, half=True),
        Variant(DENSE, write(Spec(net, scale, placed, batch=batch), folder), half=True),
        Variant(SPARSE, write(Spec(net, scale, placed, sparse=True, batch=batch), folder), half=True),
    )


def of_run(run: Path, folder: Path) -> tuple[Variant, ...]:
    """The final files of a run directory; FP32 and FP16 are the dense one without its Q/DQ, for latency alone.

    Raises:
        DataError: the run has no dense or no sparse ONNX file.
    """
    files = {branch: run / "onnx" / branch / "model.onnx" for branch in ("dense", "sparse")}
    if missing := [str(path) for path in files.values() if not path.is_file()]:
        raise DataError(f"{run}: is no finished run with both branches, {missing[0]} is missing")
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for branch, path in files.items():
        model = file.load(path)
        if branch == "dense":
            written["float"] = folder / f"{run.name}-float.onnx"
            file.save(without_qdq(model), written["float"])
        store_float_weights_(model)
        written[branch] = folder / f"{run.name}-{branch}.onnx"
        file.save(model, written[branch])
    return (
        Variant(FP32, written["float"], half=False),
        Variant(FP16, written["float"], half=True),
        Variant(DENSE, written["dense"], half=True),
        Variant(SPARSE, written["sparse"], half=True),
    )


def common(parser: argparse.ArgumentParser) -> None:
    """The options that this script and `gpu.qdq` share."""
    parser.add_argument("--runtime", default="tensorrt", choices=menu.names("runtimes"))
    parser.add_argument("--scale", choices=("full", "small"), default="full")
    parser.add_argument("--out", type=Path, required=True, help="the result file, gone on with where it exists")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu"), help="networks and engines")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--round-ms", type=float, default=30.0)
    parser.add_argument("--time-limit-s", type=float, default=300.0, help="of one build")
    parser.add_argument("--optimization-level", type=int, help="the builder's, 0 to 5")
    parser.add_argument("--budget-s", type=float, help="begin no job that would not end by then")


def setting_of(asked: argparse.Namespace) -> Setting:
    """What `common` was told. Raises RuntimeUnavailable where the runtime cannot build here."""
    if (reason := menu.entry("runtimes", asked.runtime).unavailable_reason()) is not None:
        raise RuntimeUnavailable(reason)
    return Setting(
        asked.runtime, asked.work, asked.rounds, asked.round_ms, asked.time_limit_s, asked.optimization_level
    )


def record_of(kind: str, asked: argparse.Namespace) -> Record:
    """The result file; a rehearsal is what ran elsewhere than in TensorRT, or on small networks."""
    return Record(asked.out, fingerprint(kind, rehearsal=asked.runtime != "tensorrt" or asked.scale != "full"))


def job(setting: Setting, network: str | Path, scale: str, batch: int) -> Row:
    """One network, by name, or the result of a run, by its folder, at one batch size."""
    folder = setting.work / "nets"
    variants = of_run(network, folder) if isinstance(network, Path) else of_net(network, scale, batch, folder)
    name = f"run:{network.name}" if isinstance(network, Path) else network
    row = {"net": name, "scale": scale, "workloads": workloads_of(variants[2].onnx)}
    return {**row, **measure(setting, variants, batch)}


def workloads_of(onnx: Path) -> list[Row]:
    """What each layer computes and moves for one example, whatever batch size the file is for."""
    model = file.load(onnx)
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    return [asdict(work) for work in workloads(model)]


def run(asked: argparse.Namespace) -> int:
    """Measure what is missing."""
    setting, record = setting_of(asked), record_of("engines", asked)
    networks: dict[str, str | Path] = {**{net: net for net in asked.nets}, **{f"run:{p.name}": p for p in asked.run}}
    if len(networks) < len(asked.nets) + len(asked.run):
        raise UsageError("--nets and --run: each network once; folders of runs need different names")
    jobs = {
        f"{name}/b{batch}": partial(job, setting, network, asked.scale, batch)
        for batch in asked.batches
        for name, network in networks.items()
    }
    return perform(record, jobs, budget_s=asked.budget_s, show=summary)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, 1 where a job failed, 75 where it was stopped, or that of the error, in one line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    common(parser)
    parser.add_argument("--nets", nargs="*", choices=("resnet50", "bert"), default=["resnet50", "bert"])
    parser.add_argument("--run", type=Path, action="append", default=[], help="a finished run directory; repeatable")
    parser.add_argument("--batches", type=int, nargs="+", default=list(ORDER))
    try:
        return run(parser.parse_args(arguments))
    except KeyboardInterrupt:
        print("gpu.engines: stopped; what was finished is kept", file=sys.stderr)
        return Interrupted.exit_code
    except SparsifyError as error:
        print(f"gpu.engines: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
