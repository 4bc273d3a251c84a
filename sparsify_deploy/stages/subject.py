"""What every stage of a plan works on: the network, the examples and the task, opened once a process."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from sparsify_deploy import menu
from sparsify_deploy.errors import DataError, EnvironmentProblem, ModelError, is_out_of_memory
from sparsify_deploy.recipe import Data, Model, TaskSection

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from sparsify_deploy.types import Batch, Context, DataSet, Task


@dataclass(frozen=True)
class Subject:
    """The network, data and task of a recipe. Its fields are settings; what they open is kept for the process."""

    model: Model
    data: Data
    task: TaskSection
    seed: int

    def methods(self) -> dict[str, int]:
        """The menu entries in use with their versions."""
        chosen = {"models": self.model.source, "datasets": self.data.source, "tasks": self.task.name}
        return {f"{kind}/{name}": menu.entry(kind, name).VERSION for kind, name in chosen.items()}

    def files(self) -> dict[str, Path]:
        """The files that define the network and the data."""
        found = {
            f"model.{k}": v for k, v in menu.entry("models", self.model.source).files(self.model.params).items()
        } | {f"data.{k}": v for k, v in menu.entry("datasets", self.data.source).files(self.data.params).items()}
        if self.model.checkpoint is not None:
            if self.model.checkpoint.is_dir():
                raise DataError(f"model.checkpoint: {self.model.checkpoint} is a folder: name the file in it")
            found["model.checkpoint"] = self.model.checkpoint
        return found

    def runs_user_code(self) -> list[str]:
        """The sections whose source executes a Python file of the user."""
        return [
            section
            for section, kind, name in (("model", "models", self.model.source), ("data", "datasets", self.data.source))
            if menu.entry(kind, name).RUNS_USER_CODE
        ]

    @cached_property
    def examples(self) -> DataSet:
        """The opened data set."""
        opened: DataSet = menu.entry("datasets", self.data.source).open(self.data.params)
        return opened

    @cached_property
    def opened_task(self) -> Task:
        """The task with its parameters."""
        created: Task = menu.entry("tasks", self.task.name).create(self.task.params)
        return created

    def network(self, weights: Path | None = None) -> nn.Module:
        """A fresh network: initialised from the recipe's seed, or from its checkpoint, or from `weights`."""
        import torch

        from sparsify_deploy.models._attention import unpack_attention_
        from sparsify_deploy.models._checkpoint import load_checkpoint

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model: nn.Module = menu.entry("models", self.model.source).build(self.model.params)
        if weights is None and self.model.checkpoint is not None:
            load_checkpoint(model, self.model.checkpoint)
        model = unpack_attention_(model)
        if weights is not None:
            load_weights_(model, weights)
        return model

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

        return fold_batchnorm(self._checked)

    def calibration(self, batches: int, batch_size: int) -> list[Batch]:
        """`batches` training batches without augmentation, the same for every stage and branch."""
        from sparsify_deploy.training.loop import training_batches

        split = self.examples.split("train")
        return training_batches(split, seed=self.seed, batch_size=min(batch_size, len(split)), count=batches)

    def example(self, count: int = 1) -> Batch:
        """The first `count` test examples, from the start again where there are fewer."""
        import torch

        test = self.examples.split("test")
        return test.take(torch.arange(count) % len(test))

    def check_fits(self, model: nn.Module) -> None:
        """Run one test example through the network; `ModelError` where they do not fit each other."""
        import torch

        from sparsify_deploy.types import outputs_of

        was = model.training
        model.eval()
        batch = self.example()
        try:
            with torch.no_grad():
                outputs = outputs_of(model, batch, self.examples.inputs)
            self.opened_task.loss(outputs, batch)
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
            if is_out_of_memory(error):
                raise
            shapes = ", ".join(f"{name} {tuple(batch[name].shape)}" for name in self.examples.inputs)
            raise ModelError(
                f"model {self.model.source} does not fit the data ({shapes}): {first_line(error)}; "
                "change model.params or data.params"
            ) from error
        finally:
            model.train(was)


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
