"""A first recipe for a trained network: straight to 2:4, a short fine-tune and INT8, with comments and defaults that
follow from the network and the data. What cannot work is said before the file is written."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from sparsify_deploy import menu, recipe_source
from sparsify_deploy.artifacts import durable
from sparsify_deploy.errors import MissingExtra, RecipeError, UsageError
from sparsify_deploy.safety import regular
from sparsify_deploy.stages.given import Given
from sparsify_deploy.stages.project_nm import LayerForecast, forecast_layers, reach
from sparsify_deploy.stages.training_checks import check_training
from sparsify_deploy.training.settings import Training
from sparsify_deploy.types import Json
from sparsify_deploy.workspace import open_run

if TYPE_CHECKING:
    from sparsify_deploy.stages.subject import Subject

_STEPS = 400
"""Optimizer steps that the fine-tune should at least have; few data get more epochs, up to `_MOST_EPOCHS`."""

_MOST_EPOCHS = 20
_BATCH = 64


@dataclass(frozen=True)
class Start:
    """A recipe that was written, and the layers it would project."""

    recipe: Path
    layers: tuple[LayerForecast, ...]
    examples: int
    runs_code: bool
    notes: tuple[str, ...] = ()
    """What a reader must know: labels that look wrong, weights that are in no layer."""


@dataclass(frozen=True)
class _Source:
    """One of `SOURCE:NAME`, as a section of a recipe has it."""

    source: str
    params: Mapping[str, Json]


def start(
    model: str,
    data: str | None,
    output: Path,
    *,
    checkpoint: Path | None,
    trust_code: bool,
    force: bool,
    sets: Sequence[str] = (),
    task: str | None = None,
) -> Start:
    """Write a recipe for `model` (`timm:resnet50`, `file:net.py:build`) on `data` (`folder:/data`, `digits`).

    A model `onnx:FILE` is taken as it is, and may come without data. `task` is another than the one that the targets
    suggest, such as `file:task.py:Task`. `sets` are further parameters of the two, such as
    `data.params.test_fraction=0.2`. Opens the data and builds the network to choose
    classes, batch, learning rates and epochs. Raises UsageError for a text that names no source, for a file that exists
    unless `force`, and where Python files would run without `trust_code`; what is wrong with network or data as `run`
    would.
    """
    if output.is_dir():
        raise UsageError(f"-o {output}: is a folder; name the recipe in it, such as {output / 'recipe.yaml'}")
    if output.exists() and not force:
        raise UsageError(f"-o {output}: exists already; name another file, or add --force")
    if not output.absolute().parent.is_dir():
        raise UsageError(f"-o {output}: the folder {output.absolute().parent} does not exist")
    network = _with_sets("model", "models", _parsed("model", "models", model, output), sets, output)
    told = _parsed("task", "tasks", task, output) if task is not None else None
    if network.source == "onnx":
        if checkpoint is not None:
            raise UsageError("--checkpoint: is loaded into a torch network, and an ONNX file has none: leave it out")
        given = (
            _with_sets("data", "datasets", _parsed("data", "datasets", data, output), sets, output) if data else None
        )
        if given is None and told is not None:
            raise UsageError(f"--task {task}: measures answers to examples: give --data too")
        return _start_given(network, given, told, output, trust_code)
    if data is None:
        raise UsageError(f"--data: is needed for --model {model}; only an ONNX file can do without")
    examples = _with_sets("data", "datasets", _parsed("data", "datasets", data, output), sets, output)
    examples = _beside_network(examples, network, output)
    weights = _beside(checkpoint, output) if checkpoint is not None else None
    subject = _opened(_text(output, network, examples, weights, _Chosen(task=told)), output, trust_code)
    found = subject.examples
    network = _Source(network.source, {**network.params, **_fitting(network, subject)})
    size, chosen = len(found.split("train")), told or (_Source("regression", {}) if _of_values(subject) else None)
    first = _text(output, network, examples, weights, _Chosen(size=size, task=chosen))
    subject = _opened(first, output, trust_code)
    examples = _scaled(examples, subject)
    check_training(subject, Training(steps=1), subject.check_network())
    notes = (*subject.label_notes, *([line] if (line := reach(subject).line) else []))
    normed = any(type(part).__name__ == "LayerNorm" for part in subject.check_traceable().modules())
    layers = forecast_layers(subject, None)
    text = _text(output, network, examples, weights, _Chosen(size, layers, normed, chosen, notes))
    _opened(text, output, trust_code)
    _written(output, text)
    return Start(output, layers, size, bool(_flag(network, examples, told)), notes)


def _flag(network: _Source, data: _Source | None, task: _Source | None) -> str:
    """What a command needs besides the recipe where that names code of the user's."""
    chosen = {"models": network, "datasets": data, "tasks": task}
    entries = [menu.entry(kind, each.source) for kind, each in chosen.items() if each is not None]
    return " --trust-code" if any(entry.RUNS_USER_CODE for entry in entries) else ""


def _written(output: Path, text: str) -> None:
    durable.write_text(output, text)


def _start_given(network: _Source, data: _Source | None, task: _Source | None, output: Path, trust_code: bool) -> Start:
    """A recipe for the deploy half alone, after a look into the file and the data."""
    from sparsify_deploy.graph import file
    from sparsify_deploy.graph.layers import weight_layers
    from sparsify_deploy.reporting.layer_verdict import file_part

    subject = _opened(_given_text(output, network, data, task), output, trust_code)
    assert isinstance(subject, Given)
    found = file_part(weight_layers(file.load(subject.path)))
    layers = tuple(LayerForecast(row.name, row.shape, row.usable, row.reason) for row in found)
    subject.test_arrays(1)
    held = sum(row.usable for row in found)
    precisions = " and ".join(sorted({row.precision for row in found})) or "no"
    about = f"# {precisions} weights; {held} of {len(found)} layers hold 2:4."
    sizes = (subject.fixed_batch,) if subject.fixed_batch is not None else (1, 32)
    _written(output, _given_text(output, network, data, task, about=about, sizes=sizes))
    size = len(subject.examples.split("train")) if data is not None else 0
    return Start(output, layers, size, bool(_flag(network, data, task)))


def _given_text(
    output: Path,
    network: _Source,
    data: _Source | None,
    task: _Source | None,
    *,
    about: str = "",
    sizes: Sequence[int] = (1,),
) -> str:
    flag = _flag(network, data, task)
    lines = [
        "# An ONNX file as it is: built, raced against variants of itself, judged. Nothing is trained.",
        "#",
        f"#     sparsify-deploy plan {output.name}{flag}    what would run, the gain of 2:4 to expect; runs nothing",
        f"#     sparsify-deploy run {output.name}{flag}",
        "version: 1",
        "",
        *([about] if about else []),
        "model:",
        "  source: onnx",
        f"  params: {_flow(network.params)}",
        "",
        *(["data:", f"  source: {data.source}"] if data else ["# No data: inputs are drawn and no accuracy is known."]),
        *([f"  params: {_flow(data.params)}"] if data and data.params else []),
        "",
        *([_task(task), ""] if task is not None else []),
        "deploy:",
        *(f"  - runtime: {name}" for name in _runtimes()),
        "",
        f"benchmark: {{batch_sizes: {list(sizes)}}}",
    ]
    if data:
        gate = "  max_drop: 0.01  # of the first metric, the engine against the file in ONNX Runtime"
        lines += ["", "gates:", gate]
    return "\n".join(lines) + "\n"


def _parsed(option: str, kind: str, text: str, output: Path) -> _Source:
    """`timm:resnet50` or `file:net.py:build` as a source with its parameters; paths as seen from the recipe."""
    source, _, rest = text.partition(":")
    known = menu.names(kind)
    if source not in known:
        raise UsageError(f"--{option} {text}: no source {source!r}{menu.did_you_mean(source, known)}")
    fields = menu.entry(kind, source).Params.model_fields
    if not rest:
        needed = [name for name, field in fields.items() if field.is_required()]
        if needed:
            raise UsageError(f"--{option} {text}: {source} needs a {needed[0]}, as in {source}:{needed[0].upper()}")
        return _Source(source, {})
    if "path" not in fields or _of_a_hub(kind, rest, fields):
        return _Source(source, {"name": rest})
    path, _, made = rest.partition(":")
    given: dict[str, Json] = {"path": _beside(Path(path), output)}
    if made:
        names = [name for name in ("object", "name") if name in fields]
        taken = next((name for name in names if name == "object" or fields[name].is_required()), None)
        if taken is None:
            raise UsageError(f"--{option} {text}: {source} takes a path and nothing after it")
        given[taken] = made
    elif "name" in fields and fields["name"].is_required():
        raise UsageError(f"--{option} {text}: {source} needs a folder and a name, as in {source}:FOLDER:NAME")
    return _Source(source, given)


def _of_a_hub(kind: str, text: str, fields: Collection[str]) -> bool:
    """Whether a text is a name rather than a folder, for a source of networks that takes either."""
    return kind == "models" and "name" in fields and not text.startswith((".", "/", "~")) and not Path(text).exists()


def _beside(path: Path, output: Path) -> str:
    """A path as a recipe in `output`'s folder has to give it."""
    expanded = path.expanduser()
    return str(expanded) if expanded.is_absolute() else os.path.relpath(expanded, output.absolute().parent)


def _with_sets(option: str, kind: str, source: _Source, sets: Sequence[str], output: Path) -> _Source:
    """A source with the parameters that `--set` gives it; paths in them as seen from the recipe."""
    given: dict[str, Json] = dict(source.params)
    for item in sets:
        name, equals, text = item.partition("=")
        section, _, field = name.strip().partition(".params.")
        if not equals or not field or section not in ("model", "data"):
            raise UsageError(
                f"--set {item}: init takes model.params.KEY=VALUE and data.params.KEY=VALUE; the rest is a field of "
                "the recipe that it writes"
            )
        if section != option:
            continue
        about = menu.entry(kind, source.source).Params.model_fields.get(field)
        if about is not None and "Path" in str(about.annotation):
            given[field] = _beside(Path(text), output)
            continue
        given = recipe_source.with_set({option: {"params": given}}, item)[option]["params"]
    return _Source(source.source, given)


def _beside_network(data: _Source, network: _Source, output: Path) -> _Source:
    """What the folder of a network says of its data: it commonly holds the tokenizer, the positions and image size."""
    fields = menu.entry("datasets", data.source).Params.model_fields
    place = network.params.get("path")
    if network.source != "transformers" or not isinstance(place, str):
        return data
    try:
        about = json.loads(regular.read(output.absolute().parent / place / "config.json"))
    except (OSError, ValueError, RecursionError):
        about = {}
    if not isinstance(about, dict):
        about = {}  # opening the network says what is wrong with its folder
    found: dict[str, Json] = {"tokenizer": place} if "tokenizer" in fields else {}
    positions, size = (about.get(key) for key in ("max_position_embeddings", "image_size"))
    if "max_length" in fields and isinstance(positions, int) and positions < fields["max_length"].default:
        found["max_length"] = positions
    if "size" in fields and "image_size" in about and isinstance(size, int):
        found["size"] = size
    return _Source(data.source, {**data.params, **found, **data.params})


def _scaled(data: _Source, subject: Subject) -> _Source:
    """With the scale of images that timm says its network was trained on, where it is not ImageNet's."""
    trained = getattr(subject.check_network(), "pretrained_cfg", None) or {}
    normalize = menu.entry("datasets", data.source).Params.model_fields.get("normalize")
    if normalize is None or "half" not in str(normalize.annotation) or "normalize" in data.params:
        return data
    halves = (0.5, 0.5, 0.5)
    if tuple(trained.get("mean", ())) == halves and tuple(trained.get("std", ())) == halves:
        return _Source(data.source, {**data.params, "normalize": "half"})
    return data


def _of_values(subject: Subject) -> bool:
    """Whether the targets are real numbers, so that the task is regression."""
    import torch

    return subject.examples.split("train").take(torch.arange(1))["target"].is_floating_point()


def _fitting(network: _Source, subject: Subject) -> dict[str, Json]:
    """Parameters of the network that follow from the data, where its source has them."""
    import torch

    fields = menu.entry("models", network.source).Params.model_fields
    examples = subject.examples
    found: dict[str, Json] = {}
    if "classes" in fields and examples.classes:
        found["classes"] = len(examples.classes)
    elif "classes" in fields:
        train = examples.split("train")
        target = train.take(torch.arange(len(train)))["target"]
        if not target.is_floating_point():
            found["classes"] = int(target.max()) + 1
    shape = tuple(subject.example()[examples.inputs[0]].shape[1:])
    if "in_channels" in fields and len(shape) == 3:
        found["in_channels"] = shape[0]
    if network.params.get("name", "").startswith("lenet") and len(shape) == 3:
        found["image_size"] = shape[1]
    if "task" in fields:
        found["task"] = "image_classification" if len(shape) == 3 else "sequence_classification"
        found["pretrained"] = True
        if tuple(examples.inputs) != fields["inputs"].default and len(shape) != 3:
            found["inputs"] = list(examples.inputs)
    return found


def _opened(text: str, output: Path, trust_code: bool) -> Subject:
    """The subject of a recipe that is not written yet, read from where it will lie."""
    with tempfile.NamedTemporaryFile("w", dir=output.absolute().parent, prefix=".init-", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        try:
            return open_run(Path(file.name), trust_code=trust_code).plan.subject
        except RecipeError as error:  # the place is one in a file that nobody sees
            said = [mistake.split(": ", 1)[-1] for mistake in error.mistakes]
            raise UsageError(*(f"init: {line}" for line in said)) from None
        except UsageError as error:
            raise UsageError(str(error).replace(file.name, "init")) from None


@dataclass(frozen=True)
class _Chosen:
    """What the data and the network decide."""

    size: int = 0
    layers: Sequence[LayerForecast] = ()
    normed: bool = False
    task: _Source | None = None
    """None: classification, which a recipe need not say."""
    notes: Sequence[str] = ()


def _text(output: Path, network: _Source, data: _Source, checkpoint: str | None, chosen: _Chosen) -> str:
    """The recipe. Values are JSON, which YAML reads."""
    batch = max(1, min(_BATCH, chosen.size // 4 or _BATCH))
    epochs = min(_MOST_EPOCHS, max(2, ceil(_STEPS * batch / chosen.size))) if chosen.size else 2
    if chosen.normed:
        optimizer, qat_lr = "{name: adamw, lr: 0.00005, weight_decay: 0.01}", "0.00001"
        why = "LayerNorm in it, so AdamW at what transformers are commonly fine-tuned with"
    else:
        optimizer, qat_lr = "{name: sgd, lr: 0.01, momentum: 0.9, weight_decay: 0.0001}", "0.001"
        why = "a tenth of the 0.1 that convolutional networks are commonly trained with"
    flag = _flag(network, data, chosen.task)
    real = "  # the targets are real numbers" if chosen.task == _Source("regression", {}) else ""
    lines = [
        "# From a trained network to a 2:4-sparse INT8 engine, beside the dense twin of the same network.",
        "#",
        f"#     sparsify-deploy plan {output.name}{flag}    what would run, its cost, the gain to expect; runs nothing",
        f"#     sparsify-deploy run {output.name}{flag}",
        "version: 1",
        "",
        "model:",
        f"  source: {network.source}",
        *([f"  params: {_flow(network.params)}"] if network.params else []),
        *(
            [f"  checkpoint: {json.dumps(checkpoint)}"]
            if checkpoint
            else []
            if network.params.get("pretrained")
            else ["  # Untrained as it stands. checkpoint: weights.safetensors, or a .pt that holds tensors alone"]
        ),
        "",
        "data:",
        f"  source: {data.source}",
        *([f"  params: {_flow(data.params)}"] if data.params else []),
        "",
        *([_task(chosen.task) + real, ""] if chosen.task is not None else []),
        f"# {chosen.size} training examples. The learning rate: {why}." if chosen.size else "# The training.",
        "training:",
        f"  epochs: {epochs}",
        f"  batch_size: {batch}",
        f"  optimizer: {optimizer}",
        "  schedule: {name: cosine, warmup_fraction: 0.05}",
        "",
        *_about(chosen.layers),
        *(f"# {note}" for note in chosen.notes),
        "nm:",
        '  pattern: "2:4"',
        "  permute: channel_swap  # reorders channels so that 2:4 keeps more; the outputs stay the same",
        "  fine_tune: {}",
        "",
        "quantize:",
        "  calibration_batches: 8",
        f"  qat: {{epochs: {max(1, epochs // 3)}, optimizer: {{lr: {qat_lr}}}, schedule: {{warmup_fraction: 0.0}}}}",
        "",
        "deploy:",
        *(f"  - runtime: {name}" for name in _runtimes()),
        "",
        "benchmark: {batch_sizes: [1, 32]}",
        "",
        *_gate(chosen.task),
    ]
    return "\n".join(lines) + "\n"


def _task(task: _Source) -> str:
    params = f", params: {_flow(task.params)}" if task.params else ""
    return f"task: {{name: {task.source}{params}}}"


def _gate(task: _Source | None) -> list[str]:
    if task is not None and menu.entry("tasks", task.source).RUNS_USER_CODE:
        return ["# gates: {max_drop: 0.01}  # of the task's first metric, against dense FP32; exit code 4 beyond it"]
    if task is not None and task.source == "regression":
        return ["# gates: {max_drop: 0.1}  # rise of rmse over dense FP32, in the target's unit; exit code 4 beyond it"]
    gate = "  max_drop: 0.01  # of the first metric, against dense FP32; a larger one ends the run with exit code 4"
    return ["gates:", gate]


def _flow(values: Mapping[str, Json]) -> str:
    return "{" + ", ".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()) + "}"


def _about(layers: Sequence[LayerForecast]) -> list[str]:
    if not layers:
        return []
    projected = sum(layer.projected for layer in layers)
    lines = [f"# 2:4 by the hardware's rule of thumb: {projected} of {len(layers)} layers."]
    reasons: dict[str, list[str]] = {}
    for layer in layers:
        if not layer.projected:
            reasons.setdefault(layer.reason, []).append(layer.name or "the network itself")
    for reason, names in list(reasons.items())[:5]:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        lines.append(f"#   not {', '.join(names[:3])}{more}: {reason}")
    return lines


def _runtimes() -> list[str]:
    """Those that can build and run here, the ones that can use sparsity first; at least one."""
    found = []
    for name in ("tensorrt", "openvino", "onnxruntime"):
        runtime = menu.entry("runtimes", name)
        if runtime.unavailable_reason() is None and runtime.cannot_run_reason() is None:
            found.append(name)
    if not found:
        raise MissingExtra("a runtime", "cpu", "a recipe that ends in an engine")
    return found
