"""A Triton model repository for one engine: `NAME/config.pbtxt`, `NAME/1/`, labels, and how inputs are made.

Clients make the inputs: `preprocessing.json` beside the configuration says how, and so does its parameter of that name.

Names, types and shapes are those of the ONNX file that the engine was built from. Nothing here was served: the
configuration is written by Triton's documented rules and validated against its protobuf schema.
References: Triton's user guide on model configuration; the OpenVINO backend's README and source (batching).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from sparsify_deploy.artifacts import durable
from sparsify_deploy.errors import ModelError, UsageError
from sparsify_deploy.preprocessing import spec
from sparsify_deploy.safety.printable import one_line
from sparsify_deploy.types import IOTensor, Json

SERVED = {"tensorrt": "model.plan", "onnxruntime": "model.onnx", "openvino": "model.xml"}
"""The runtimes Triton has a backend for, and the file each looks for by default."""

CONFIG = "config.pbtxt"
LABELS = "labels.txt"
FORMAT = 2
"""Raised when the same engine would get another configuration."""

LARGEST_BATCH = 32
"""`max_batch_size` where the file takes any batch: a choice of ours, not a limit."""

_LONGEST_NAME = 200
"""Letters, so that a folder can be called so, with what is put around it while it is written."""

_TYPES = {
    "bool": "TYPE_BOOL",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
    "bfloat16": "TYPE_BF16",
    **{f"{sign}int{bits}": f"TYPE_{sign.upper()}INT{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}

CONTAINERS_OF_TENSORRT = {
    "8.6.3": ("24.02", "24.03"),
    "10.0.1": ("24.05", "24.05"),
    "10.3.0": ("24.08", "24.08"),
    "10.4.0": ("24.09", "24.09"),
    "10.6.0": ("24.11", "24.11"),
    "10.7.0": ("24.12", "24.12"),
    "10.8.0": ("25.01", "25.01"),
}
"""TensorRT to the first and last `nvcr.io/nvidia/tritonserver:YY.MM-py3` known to have it, from Triton's compatibility
page and release notes; a version that is not here is in NVIDIA's Frameworks Support Matrix,
https://docs.nvidia.com/deeplearning/frameworks/support-matrix. A plan runs in the version that built it."""

CONTAINERS_OF_ONNXRUNTIME = {
    "1.18.0": ("24.05", "24.06"),
    "1.18.1": ("24.07", "24.08"),
    "1.19.2": ("24.09", "24.11"),
    "1.20.1": ("24.12", "25.02"),
    "1.21.0": ("25.03", "25.04"),
    "1.22.0": ("25.05", "25.07"),
    "1.23.0": ("25.08", "25.09"),
    "1.23.1": ("25.10", "25.10"),
    "1.23.2": ("25.11", "26.01"),
    "1.24.1": ("26.02", "26.02"),
    "1.24.2": ("26.03", "26.03"),
    "1.24.4": ("26.04", "26.06"),
    "1.27.0": ("26.07", "26.07"),
    "1.28.0": ("26.08", "26.08"),
}
"""ONNX Runtime likewise: docs/introduction/compatibility.md of triton-inference-server/server."""


@dataclass(frozen=True)
class Model:
    """An engine to be served, from the record beside it.

    `files` are its own by their name in the repository.
    `inputs` and `outputs` are the ONNX file's. `largest_batch` is what its builder was told, or a choice. `why` says in
    one line which model this is; `labels` are class names by index. `preprocessing` are files, by name, that say how a
    raw example becomes the inputs. `axis_sizes` is input to free axis, as text, to its least, typical and largest size.
    """

    engine: Path
    files: Mapping[str, Path]
    runtime: str
    version: str
    params: Mapping[str, Json]
    inputs: tuple[IOTensor, ...]
    outputs: tuple[IOTensor, ...]
    largest_batch: int
    why: str
    labels: tuple[str, ...] = ()
    preprocessing: Mapping[str, Path] = field(default_factory=dict)
    axis_sizes: Mapping[str, Mapping[str, Sequence[int]]] = field(default_factory=dict)

    @property
    def dynamic(self) -> bool:
        """Whether the batch is the first axis of every input and output and free in all of them."""
        return all(t.shape and t.shape[0] is None for t in (*self.inputs, *self.outputs))

    @property
    def batched(self) -> bool:
        """Whether Triton forms batches. With its OpenVINO backend it would then refuse every other batch size."""
        return self.dynamic and self.runtime != "openvino"


def unserved(runtime: str) -> str | None:
    """Why Triton cannot serve engines of `runtime`, or None."""
    if runtime in SERVED:
        return None
    if runtime == "tensorrt_rtx":
        return "Triton cannot serve tensorrt_rtx engines, only TensorRT-RTX runs them: use tensorrt, or leave it out"
    return f"Triton has no backend for {runtime}: use one of {', '.join(SERVED)}"


def model_name(base: str, runtime: str) -> str:
    """A name Triton and every file system take. It holds the runtime, so that two of one recipe do not collide."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", base)[:_LONGEST_NAME].strip("._-") or "model"
    return f"{plain}_{runtime}"


def described(
    engine: Path,
    record: Mapping[str, Json],
    onnx: Path,
    *,
    why: str,
    labels: Sequence[str] = (),
    largest_batch: int = LARGEST_BATCH,
    preprocessing: Mapping[str, Path] | None = None,
) -> Model:
    """The engine with what its record and its ONNX file say of it. Raises UsageError where Triton cannot serve it."""
    from sparsify_deploy.graph import file

    if (reason := unserved(record["runtime"])) is not None:
        raise UsageError(f"{engine}: {reason}")
    loaded = file.load(onnx)
    return Model(
        engine=engine,
        files=served_files(engine, record),
        runtime=record["runtime"],
        version=record["version"],
        params=record["params"],
        inputs=file.inputs(loaded),
        outputs=file.outputs(loaded),
        largest_batch=record["params"].get("max_batch", largest_batch),
        why=why,
        labels=tuple(labels),
        preprocessing=preprocessing or {},
        axis_sizes=record.get("facts", {}).get("axis_sizes", {}),
    )


def write(folder: Path, name: str, model: Model, *, made_from: str = "") -> Path:
    """Write the model `name` into the repository `folder` and return its folder; what was there is replaced.

    `made_from` is noted in the configuration, for a caller who asks later whether it is still up to date.
    """
    target = folder / name
    with durable.replacing_folder(target) as fresh:
        (fresh / "1").mkdir()
        for file, source in model.files.items():
            shutil.copyfile(source, fresh / "1" / file)
        for file, source in model.preprocessing.items():
            shutil.copyfile(source, fresh / file)
        if _labelled(model):
            lines = "".join(one_line(" ".join(label.split())) + "\n" for label in model.labels)
            (fresh / LABELS).write_text(lines, encoding="utf-8")
        text = config(name, model) + (f"# {made_from}\n" if made_from else "")
        (fresh / CONFIG).write_text(text, encoding="utf-8")
    return target


def served_files(engine: Path, record: Mapping[str, Json]) -> dict[str, Path]:
    """The files of an engine by their name in `NAME/1/`."""
    served = SERVED[record["runtime"]]
    names = (Path(name).name for name in record["files"])
    return {_renamed(name, engine.name, served): engine.with_name(name) for name in names}


def is_made_from(target: Path, made_from: str) -> bool:
    """Whether `write` left the configuration in `target` with that note."""
    path = target / CONFIG
    return path.is_file() and path.read_text(encoding="utf-8").endswith(f"# {made_from}\n")


def config(name: str, model: Model) -> str:
    """The text of config.pbtxt."""
    return "\n".join(_lines(name, model)) + "\n"


def requirement(model: Model) -> str:
    """Which container serves the engine, as far as NVIDIA's tables say."""
    short = ".".join(model.version.split(".")[:3])
    if model.runtime == "tensorrt":
        found = CONTAINERS_OF_TENSORRT.get(short)
        rule = f"the plan was built by TensorRT {model.version} and runs in that version, on that kind of GPU, alone"
        where = f"container {_tags(found)}" if found else "which container has it is not known to this program"
        return f"{rule}: {where}; NVIDIA's Frameworks Support Matrix lists them all"
    if model.runtime == "onnxruntime":
        found = CONTAINERS_OF_ONNXRUNTIME.get(short)
        newest = max(CONTAINERS_OF_ONNXRUNTIME, key=_numbers)
        where = (
            f"container {_tags(found)} has it"
            if found
            else f"no container is known to have it (up to {CONTAINERS_OF_ONNXRUNTIME[newest][1]}: {newest})"
        )
        text = f"tried with ONNX Runtime {model.version}; {where}, others run it if they know its opset"
        if model.params.get("provider", "CPU") == "CPU":
            text += "; before 1.30 it computes INT8 convolutions wrongly on CPUs with AMX"
        return text
    return (
        f"the IR was written by OpenVINO {model.version}: the backend's OpenVINO should be as new; which container has "
        "it is not known to this program (its versions are in build.py of triton-inference-server/server)"
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _tags(span: tuple[str, str]) -> str:
    first, last = (f"nvcr.io/nvidia/tritonserver:{tag}-py3" for tag in span)
    return first if first == last else f"{first} to {last}"


def _lines(name: str, model: Model) -> Iterator[str]:
    yield from _comment(model.why)
    yield from _comment(f"Needs: {requirement(model)}.")
    yield from _comment("Written by Triton's rules and checked against its schema; no server has run it here.")
    yield f"name: {_quoted(name)}"
    yield f"backend: {_quoted(model.runtime)}"
    yield f"default_model_filename: {_quoted(SERVED[model.runtime])}"
    if model.batched:
        yield from _comment(_batch_note(model))
        yield f"max_batch_size: {model.largest_batch}"
    else:
        if model.dynamic:
            yield from _comment("The batch is the first of dims: above max_batch_size 0, the OpenVINO backend takes")
            yield from _comment("requests of that very size alone. Clients may send any batch; Triton forms none.")
        yield "max_batch_size: 0"
    for tensor in model.inputs:
        yield from _tensor("input", tensor, model)
    labelled = _labelled(model)
    for tensor in model.outputs:
        yield from _tensor("output", tensor, model, labels=tensor.name in labelled)
    yield f"instance_group {{ count: 1 kind: {'KIND_GPU' if _on_gpu(model) else 'KIND_CPU'} }}"
    if model.batched and model.largest_batch > 1:
        yield "dynamic_batching { }"
    if model.runtime == "openvino" and model.params.get("precision") == "bf16":
        yield 'parameters { key: "HINT_BF16" value { string_value: "YES" } }'
    if spec.FILE in model.preprocessing:
        made = json.dumps(spec.read(model.preprocessing[spec.FILE]).to_json(), sort_keys=True, separators=(",", ":"))
        yield from _comment(f"How a raw example becomes the inputs, which a client does; {spec.FILE} holds the same.")
        yield f'parameters {{ key: "preprocessing" value {{ string_value: {_quoted(made)} }} }}'
    yield from _warm_ups(model)


def _batch_note(model: Model) -> str:
    if model.runtime == "tensorrt":
        return f"{model.largest_batch} is the largest batch of the engine's optimization profile."
    return f"The file takes any batch; {model.largest_batch} is a choice."


def _tensor(kind: str, tensor: IOTensor, model: Model, *, labels: bool = False) -> Iterator[str]:
    dims = _dims(tensor, model)
    yield f"{kind} {{"
    yield f"  name: {_quoted(tensor.name)}"
    yield f"  data_type: {_type(tensor, model)}"
    yield f"  dims: [ {', '.join(map(str, dims or (1,)))} ]"
    if not dims:  # Triton has no empty shape
        yield "  reshape { shape: [ ] }"
    if labels:
        yield f"  label_filename: {_quoted(LABELS)}"
    yield "}"


def _dims(tensor: IOTensor, model: Model) -> tuple[int, ...]:
    """The shape as Triton wants it: without the batch where it forms batches, -1 for a free axis."""
    shape = tensor.shape[1:] if model.batched else tensor.shape
    return tuple(-1 if axis is None else axis for axis in shape)


def _type(tensor: IOTensor, model: Model) -> str:
    if tensor.dtype not in _TYPES:
        raise ModelError(f"{model.engine}: {tensor.name} holds {tensor.dtype}, which Triton has no type for")
    if model.runtime == "tensorrt" and tensor.dtype == "int64" and _before_10(model.version):
        return "TYPE_INT32"  # TensorRT 8 and 9 cast INT64 away when they parse
    return _TYPES[tensor.dtype]


def _before_10(version: str) -> bool:
    major = version.partition(".")[0]
    return major.isdecimal() and int(major) < 10


def _on_gpu(model: Model) -> bool:
    return model.runtime == "tensorrt" or model.params.get("provider") == "CUDA"


def _labelled(model: Model) -> set[str]:
    """The outputs with one value a class."""
    return {t.name for t in model.outputs if model.labels and len(t.shape) > 1 and t.shape[1:] == (len(model.labels),)}


def _warm_ups(model: Model) -> Iterator[str]:
    """One request of a single example and one of the largest batch; zeros for integers, which may be indices.

    Free axes have their typical size, which an engine's optimization profile holds, or 1 where that is not known.
    """
    sizes = dict.fromkeys((1, model.largest_batch)) if model.dynamic else {1: None}
    for size in sizes:
        yield "model_warmup {"
        yield f"  name: {_quoted(f'batch {size}' if model.dynamic else 'one request')}"
        yield f"  batch_size: {size if model.batched else 1}"
        for tensor in model.inputs:
            typical = model.axis_sizes.get(tensor.name, {})
            whole = [typical[str(i)][1] if str(i) in typical else axis for i, axis in enumerate(tensor.shape)]
            dims = list(_dims(replace(tensor, shape=tuple(whole)), model))
            if model.dynamic and not model.batched:
                dims[0] = size
            shape = ", ".join(str(1 if axis == -1 else axis) for axis in dims or (1,))
            data = "random_data" if "float" in tensor.dtype else "zero_data"
            value = f"data_type: {_type(tensor, model)} dims: [ {shape} ] {data}: true"
            yield f"  inputs {{ key: {_quoted(tensor.name)} value {{ {value} }} }}"
        yield "}"


def _comment(text: str) -> Iterator[str]:
    yield f"# {one_line(' '.join(text.split()))}"


def _quoted(text: str) -> str:
    """A string of protobuf's text format, in ASCII."""
    plain = (chr(b) if 32 <= b < 127 and b not in b'"\\' else f"\\{b:03o}" for b in text.encode())
    return '"' + "".join(plain) + '"'


def _renamed(file: str, engine: str, served: str) -> str:
    """An engine's file under the name that Triton looks for; parts such as `.bin` keep their suffix."""
    if file == engine:
        return served
    return Path(served).with_suffix(Path(file).suffix).name
