"""What every stage of a plan works on: the network, the examples and the task, opened once a process."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from sparsify_deploy import menu
from sparsify_deploy.errors import DataError, EnvironmentProblem, ModelError, SparsifyError, is_out_of_memory
from sparsify_deploy.recipe import CalibrationData, Data, Model, TaskSection
from sparsify_deploy.safety import usercode
from sparsify_deploy.tasks._fields import usual_name

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from sparsify_deploy.datasets._labels import Judged
    from sparsify_deploy.export.axes import FreeAxes
    from sparsify_deploy.models._checkpoint import Loaded
    from sparsify_deploy.models._exported import Exported, Refused
    from sparsify_deploy.types import Arrays, Batch, Context, DataSet, Split, Task

_TRIED = 8
"""Test examples on which a user's own task is tried."""


@dataclass(frozen=True)
class Subject:
    """The network, data and task of a recipe. Its fields are settings; what they open is kept for the process."""

    model: Model
    data: Data
    task: TaskSection
    seed: int

    trusted: ClassVar[bool] = False
    """Whether checkpoints may run the code they hold."""

    def methods(self) -> dict[str, int]:
        """The menu entries in use with their versions."""
        chosen = {"models": self.model.source, "datasets": self.data.source, "tasks": self.task.name}
        return {f"{kind}/{name}": menu.entry(kind, name).VERSION for kind, name in chosen.items()}

    def files(self) -> dict[str, Path]:
        """The files that define the network, the data and the task."""
        found = {
            f"model.{k}": v for k, v in menu.entry("models", self.model.source).files(self.model.params).items()
        } | {f"data.{k}": v for k, v in menu.entry("datasets", self.data.source).files(self.data.params).items()}
        found |= {f"task.{k}": v for k, v in menu.entry("tasks", self.task.name).files(self.task.params).items()}
        if self.model.checkpoint is not None:
            if self.model.checkpoint.is_dir():
                raise DataError(f"model.checkpoint: {self.model.checkpoint} is a folder: name the file in it")
            found["model.checkpoint"] = self.model.checkpoint
        return found

    @cached_property
    def examples(self) -> DataSet:
        """The opened data set, its labels judged. Raises DataError."""
        from sparsify_deploy.datasets._labels import judge

        opened: DataSet = menu.entry("datasets", self.data.source).open(self.data.params)
        judge(opened)
        return opened

    @property
    def data_notes(self) -> tuple[str, ...]:
        """What a reader of a report must know of the data and its labels."""
        return (*getattr(self.examples, "notes", ()), *self._judged.notes)

    @property
    def label_notes(self) -> tuple[str, ...]:
        """Those of them that are about labels."""
        return self._judged.notes

    @property
    def class_counts(self) -> tuple[int, ...] | None:
        """The training examples of each label from 0; None where the data do not tell or labels are no classes."""
        return self._judged.class_counts

    @cached_property
    def _judged(self) -> Judged:
        from sparsify_deploy.datasets._labels import judge

        return judge(self.examples)

    @cached_property
    def opened_task(self) -> Task:
        """The task with its parameters, which may ask for the class counts once it needs them."""
        created: Task = menu.entry("tasks", self.task.name).create(self.task.params)
        counting = getattr(created, "counting", None)
        counted: Task = counting(lambda: self.class_counts) if counting is not None else created
        return counted

    def network(self, weights: Path | None = None) -> nn.Module:
        """A fresh network: initialised from the recipe's seed, or from its checkpoint, or from `weights`."""
        import torch

        from sparsify_deploy.models._attention import unpack_attention_
        from sparsify_deploy.models._checkpoint import load_checkpoint

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model: nn.Module = menu.entry("models", self.model.source).build(self.model.params)
        if weights is None and self.model.checkpoint is not None:
            self._loads["checkpoint"] = load_checkpoint(
                model,
                self.model.checkpoint,
                partial=self.model.checkpoint_partial,
                match=self.model.checkpoint_match,
                # what was not found to hold objects was shown to nobody
                trusted=self.trusted and usercode.approved(self.model.checkpoint) is not None,
            )
        model = self._followable(unpack_attention_(model))
        if weights is not None:
            load_weights_(model, weights)
        return model

    def _followable(self, model: nn.Module) -> nn.Module:
        """`model`, or on the same weights the graph that torch.export makes of it where torch.fx cannot trace it."""
        from sparsify_deploy.models._exported import Exported, followable

        def batches() -> tuple[list[Batch], dict[str, tuple[int, ...]]]:
            inputs, axes = self.examples.inputs, self.free_axes.axes
            whole: list[Batch] = [*map(self.example, (2, 3, 1)), *self.extremes(), *self._other_sizes()]
            given: list[Batch] = [{name: batch[name] for name in inputs} for batch in whole]
            return given, {name: (0, *axes.get(name, ())) for name in inputs}

        if not self._graphs:
            self._graphs.append(followable(model, batches))
        (graph,) = self._graphs
        return graph.over(model) if isinstance(graph, Exported) else model

    @cached_property
    def _graphs(self) -> list[Exported | Refused | None]:
        return []

    @cached_property
    def _loads(self) -> dict[str, Loaded]:
        return {}

    @property
    def loaded(self) -> Loaded | None:
        """What became of the recipe's checkpoint; None where it names none."""
        if self.model.checkpoint is not None and not self._loads:
            self.check_network()
        return self._loads.get("checkpoint")

    def check_network(self) -> nn.Module:
        """The untrained network, built and run on one example, once a process; `ModelError` where that fails."""
        return self._checked

    def check_traceable(self) -> nn.Module:
        """The same, traced, with BatchNorm folded; `ModelError` where torch.fx cannot follow the network."""
        return self._traced

    @cached_property
    def _checked(self) -> nn.Module:
        model = self.network()
        self.check_fits(model)
        return model

    @cached_property
    def _traced(self) -> nn.Module:
        from sparsify_deploy.quantization.folding import fold_batchnorm

        try:
            return fold_batchnorm(self._checked)
        except ModelError as error:
            said = "; nor can torch.export follow it: ".join([str(error), *self._refusals()])
            if error.__cause__ is not None and menu.entry("models", self.model.source).RUNS_USER_CODE:
                said = f"{usercode.line_of(self.model.params.path, error.__cause__)}: {said}"  # type: ignore[attr-defined]
            raise ModelError(said) from error

    def _refusals(self) -> list[str]:
        """Why torch.export could not help, where it was asked."""
        from sparsify_deploy.models._exported import Refused

        return [graph.reason for graph in self._graphs if isinstance(graph, Refused)]

    def calibration(self, batches: int, batch_size: int, data: CalibrationData | None = None) -> list[Batch]:
        """`batches` training batches without augmentation, the same for every stage and branch.

        With `data` they come from there, and hold no more than the inputs.
        """
        from sparsify_deploy.training.loop import training_batches

        split = self.examples.split("train") if data is None else self.calibration_examples(data)[0]
        return training_batches(split, seed=self.seed, batch_size=min(batch_size, len(split)), count=batches)

    def answers(self, outputs: Mapping[str, object]) -> Collection[str] | None:
        """The outputs whose largest value is the network's answer, as the task has it; None without examples.

        Where the task does not say: the only output or the one called `logits`, if each example has one integer label.
        """
        if not self.measured:
            return None
        told: Callable[[Mapping[str, object]], Collection[str]] | None = getattr(self.opened_task, "answers", None)
        if told is not None:
            return told(outputs)
        name = usual_name(outputs)
        return [name] if name in outputs and self._one_label else []

    @cached_property
    def _one_label(self) -> bool:
        """Whether the target of an example is one integer."""
        target = self.example().get("target")
        return target is not None and target.ndim == 1 and not target.is_floating_point()

    @property
    def measured(self) -> bool:
        """Whether there are examples to take metrics on."""
        return True

    @property
    def packages(self) -> tuple[str, ...]:
        """What reading the examples needs."""
        return ("torch",)

    def test_arrays(self, count: int | None = None) -> Arrays:
        """The first `count` test examples as `example` has them; None: all of them, once."""
        import torch

        test = self.examples.split("test")
        batch = test.take(torch.arange(len(test))) if count is None else self.example(count)
        return {name: values.numpy() for name, values in batch.items()}

    def calibration_examples(self, data: CalibrationData) -> tuple[Split, tuple[str, ...]]:
        """The examples of another source and what to say of them, opened once a process. Raises DataError."""
        from sparsify_deploy.stages.calibration import opened

        key = data.model_dump_json()
        if key not in self._calibrations:
            self._calibrations[key] = opened(data, self.examples)
        return self._calibrations[key]

    @cached_property
    def _calibrations(self) -> dict[str, tuple[Split, tuple[str, ...]]]:
        return {}

    def example(self, count: int = 1) -> Batch:
        """The first `count` test examples, from the start again where there are fewer.

        Axes whose size differs between batches have their typical size, cut or filled up from their own start.
        """
        import torch

        from sparsify_deploy.export.axes import sized

        test, free = self.examples.split("test"), self.free_axes
        return self._for_task(sized(test.take(torch.arange(count) % len(test)), free, free.typical))

    def _for_task(self, batch: Batch) -> Batch:
        own: Callable[[Batch], Batch] | None = getattr(self.opened_task, "example_inputs", None)
        return batch if own is None else own(batch)

    def _largest_label(self) -> list[Batch]:
        """An example of the largest label of all splits, for which the network may have no class."""
        import torch

        from sparsify_deploy.datasets._labels import largest_label
        from sparsify_deploy.export.axes import sized

        found = largest_label(self.examples)
        if found is None:
            return []
        batch = self.examples.split(found[0]).take(torch.tensor([found[1]]))
        return [self._for_task(sized(batch, self.free_axes, self.free_axes.typical))]

    def timed_arrays(self, count: int) -> Arrays:
        """The first `count` test examples for timing: as `example` has them."""
        if not self.free_axes:
            return self.test_arrays(count)
        return {name: values.numpy() for name, values in self.example(count).items()}

    @cached_property
    def free_axes(self) -> FreeAxes:
        """The axes besides the batch whose size differs between batches of the data."""
        from sparsify_deploy.export.axes import free_axes

        return free_axes(self.examples)

    def extremes(self) -> list[Batch]:
        """One example at the least and one at the largest sizes of the free axes; none where there are no sizes."""
        from sparsify_deploy.export.axes import sized

        sizes = self.free_axes.sizes
        pairs = [{name: getattr(size, end) for name, size in sizes.items()} for end in ("least", "largest")]
        return [sized(self.example(), self.free_axes, each) for each in pairs if each]

    def _other_sizes(self) -> list[Batch]:
        """An example at one other size of each free axis whose sizes the data do not tell."""
        from sparsify_deploy.export.axes import sized, sizes_of

        example = self.example()
        unknown = {k: v for k, v in sizes_of(example, self.free_axes).items() if k not in self.free_axes.sizes}
        others = [{name: size - 1 if size > 1 else size + 1} for name, size in unknown.items()]
        return [sized(example, self.free_axes, each) for each in others]

    def check_fits(self, model: nn.Module) -> None:
        """Run one test example through the network and its task, also at the least and largest sizes of free axes,
        and one of the largest label.

        A user's own task is tried on a few more. `ModelError` where network and data do not fit each other, with the
        user's line where that is in a file of theirs; `DataError` where the task does not.
        """
        import torch

        check = getattr(self.opened_task, "check", None)
        was = model.training
        model.eval()
        try:
            for batch in (self.example(), *self.extremes(), *self._largest_label()):
                with torch.no_grad():
                    outputs = self.outputs(model, batch)
                self._check_task(outputs, batch)
            if check is not None:
                batch = self.example(min(_TRIED, len(self.examples.split("test"))))
                with torch.no_grad():
                    outputs = self.outputs(model, batch)
                check(outputs, batch)
        finally:
            model.train(was)

    def outputs(self, model: nn.Module, batch: Batch, when: str = "") -> dict[str, Tensor]:
        """The outputs of the network for a batch; errors say `when`.

        Raises ModelError, also where one is no tensor with examples first.
        """
        from sparsify_deploy.types import outputs_of

        shapes = ", ".join(f"{name} {tuple(batch[name].shape)}" for name in self.examples.inputs)
        what = f"model {self.model.source} does not fit the data ({shapes}){when}"
        try:
            outputs = outputs_of(model, batch, self.examples.inputs)
        except SparsifyError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            said = first_line(error)
            if menu.entry("models", self.model.source).RUNS_USER_CODE:
                said = usercode.one_line(self.model.params.path, error)  # type: ignore[attr-defined]
            raise ModelError(f"{what}: {said}; {_advice(model)}{self._about_layout(batch)}") from error
        count = len(batch[self.examples.inputs[0]])
        check_outputs(outputs, count, f"model {self.model.source}")
        return outputs

    def _about_layout(self, batch: Batch) -> str:
        """What to do where arrays of three axes may have been taken for grey images."""
        channels = batch[self.examples.inputs[0]].shape[1:2]
        if getattr(self.data.params, "layout", None) != "auto" or tuple(channels) != (1,):
            return ""
        return ", such as data.params.layout none for arrays that are no grey images"

    def _check_task(self, outputs: dict[str, Tensor], batch: Batch) -> None:
        try:
            self.opened_task.loss(outputs, batch)
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
            if is_out_of_memory(error):
                raise
            raise ModelError(
                f"task {self.task.name} cannot judge model {self.model.source}: {first_line(error)}"
            ) from error


@dataclass(frozen=True)
class TrustedSubject(Subject):
    """The same where the user trusts the recipe's files."""

    trusted: ClassVar[bool] = True


def _advice(model: nn.Module) -> str:
    """What to do about a network that fails on the data."""
    import torch

    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}
    if not kinds:
        return "change model.params or data.params"
    named = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
    return f"its weights are {named}, and float32 is needed: call .float() on it (training.precision is for speed)"


def check_outputs(outputs: Mapping[str, object], count: int, what: str) -> None:
    """`ModelError` unless each is a tensor whose first axis is that of the `count` examples."""
    import torch

    if not outputs:
        raise ModelError(f"{what} gives nothing: its forward must return a tensor, or a tuple or dict of tensors")
    for name, value in outputs.items():
        if not isinstance(value, torch.Tensor):
            raise ModelError(
                f"{what} gives {type(value).__name__} as {name!r}: its forward must return a tensor, or a tuple or "
                "dict of tensors"
            )
        if value.dim() == 0 or len(value) != count:
            raise ModelError(
                f"{what} gives {name!r} of shape {tuple(value.shape)} for {count} examples: each output needs the axis "
                "of the examples first"
            )


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its type's name."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def unmet_packages(purpose: str, *packages: str) -> Sequence[str]:
    """One line for each package that cannot be found, without importing any."""
    extra = {"onnxruntime": "cpu", "openvino": "cpu"}
    return [
        f"{purpose} needs {package}: pip install 'sparsify-deploy[{extra.get(package, 'train')}]'"
        for package in packages
        if importlib.util.find_spec(package) is None
    ]


def reproducible(context: Context) -> torch.device:
    """Set torch up so that the same step gives the same bytes on this machine, and choose its device."""
    import torch

    torch.set_num_threads(context.threads or len(os.sched_getaffinity(0)))
    cuda = context.device == "cuda" or (context.device == "auto" and torch.cuda.is_available())
    if cuda and not torch.cuda.is_available():
        raise EnvironmentProblem("--device cuda: torch sees no GPU; use --device cpu, or install a CUDA build of torch")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
    torch.use_deterministic_algorithms(True, warn_only=cuda)  # some CUDA kernels have no deterministic form
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False  # on by default in convolutions, where fp32 would not be FP32
    return torch.device("cuda" if cuda else "cpu")


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a network's state dict as safetensors; the same state gives the same bytes."""
    save_tensors(model.state_dict(), path)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors, on the CPU, each with memory of its own."""
    from safetensors.torch import save_file

    save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file of ours."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: not readable as safetensors: {first_line(error)}") from error


def load_weights_(model: nn.Module, path: Path) -> None:
    """Put weights written by `save_weights` into a network of the same architecture."""
    try:
        model.load_state_dict(load_tensors(path))
    except RuntimeError as error:
        raise ModelError(f"{path}: does not fit the model: {first_line(error)}") from error
