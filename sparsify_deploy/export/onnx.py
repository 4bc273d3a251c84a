"""A torch network as an ONNX file; the only module that imports torch.onnx.

The TorchScript exporter (`dynamo=False`) is used on purpose: torch's newer one fails on the data-dependent check in
nvidia-modelopt's quantizers. modelopt's own symbolics write each weight as FP32 initializer -> QuantizeLinear ->
DequantizeLinear (axis 0 for weights), which ONNX Runtime, OpenVINO, TensorRT and TensorRT-RTX read.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparsify_deploy.errors import ModelError
from sparsify_deploy.export.axes import BATCH, FreeAxes, sized, sizes_of
from sparsify_deploy.graph import file
from sparsify_deploy.graph.axis_sizes import set_axis_sizes_
from sparsify_deploy.graph.quantizers import place_quantizers_
from sparsify_deploy.graph.tidy import tidy_
from sparsify_deploy.types import outputs_of

if TYPE_CHECKING:
    from sparsify_deploy.types import Batch

_PROTOBUF_LIMIT_BYTES = 2**31 - 2**20
_FIXED = FreeAxes()


def export(
    module: nn.Module,
    example: Batch,
    inputs: Sequence[str],
    path: Path,
    *,
    opset: int = 17,
    dynamic_batch: bool = True,
    free: FreeAxes = _FIXED,
) -> None:
    """Write `module` in eval mode to `path`, traced on the fields `inputs` of `example`, and judge the file.

    Graph inputs are named `inputs`, outputs as `outputs_of` names them, initializers as the parameters. With
    `dynamic_batch` axis 0 of every input and output is free, else it is the example's. So are the inputs' `free` axes
    and those of outputs whose size follows them; their sizes are kept in the file. Every part's mode is restored.

    Raises:
        ModelError: an operator has no ONNX form, an output is not a tensor, the weights exceed the 2 GiB of one
            protobuf file, or the file does not pass the checker with strict shape inference.
    """
    size = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
    if size > _PROTOBUF_LIMIT_BYTES:
        raise ModelError(f"the weights are {size / 2**30:.1f} GiB, more than the 2 GiB one ONNX file can hold")
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    arguments = {name: example[name].to(device) for name in inputs}
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad(), _traceable(), _quiet():
            outputs = outputs_of(module, arguments, inputs)
            _require_tensors(outputs)
            axes: dict[str, dict[int, str]] = {name: dict(free.axes.get(name, {})) for name in inputs}
            axes.update(_following(module, arguments, inputs, outputs, free))
            if dynamic_batch:
                for name, value in {**arguments, **outputs}.items():
                    axes[name] = {**({0: BATCH} if value.dim() else {}), **axes[name]}
            torch.onnx.export(
                _Named(module, inputs),
                tuple(arguments.values()),
                str(path),
                dynamo=False,
                opset_version=opset,
                input_names=list(arguments),
                output_names=list(outputs),
                dynamic_axes={name: named for name, named in axes.items() if named} or None,
                do_constant_folding=False,  # it would put an anonymous transposed copy in place of a Linear's weight
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(f"{type(module).__name__} cannot be exported to ONNX opset {opset}: {reason}") from error
    finally:
        for part, mode in modes:
            part.training = mode
    written = file.load(path)
    set_axis_sizes_(written, {name: size for name, size in free.sizes.items() if name in _used(free, inputs)})
    tidy_(written)
    place_quantizers_(written)
    file.check(written, path)
    file.save(written, path)


class _Named(nn.Module):
    """`module` with a tuple of named outputs and no prefix on its parameter names.

    It owns the same children without being one level above them; that also keeps a torch.fx module's `graph`
    attribute away from the exporter, which takes it for a TorchScript graph.
    """

    def __init__(self, module: nn.Module, inputs: Sequence[str]) -> None:
        super().__init__()
        self._modules = module._modules
        self._parameters = module._parameters
        self._buffers = module._buffers
        self._non_persistent_buffers_set = module._non_persistent_buffers_set
        self.training = module.training
        self.call = (module.forward, tuple(inputs))

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        forward, inputs = self.call
        named = outputs_of(forward, dict(zip(inputs, values, strict=True)), inputs)  # type: ignore[arg-type]
        return tuple(named.values())


def _used(free: FreeAxes, inputs: Sequence[str]) -> set[str]:
    return {name for each in inputs for name in free.axes.get(each, {}).values()}


def _following(
    module: nn.Module, arguments: Batch, inputs: Sequence[str], outputs: dict[str, Tensor], free: FreeAxes
) -> dict[str, dict[int, str]]:
    """Output -> axis -> name of the axes whose size changes with a free axis of an input, found by running again."""
    found: dict[str, dict[int, str]] = {name: {} for name in outputs}
    if not _used(free, inputs):
        return found
    mine = FreeAxes({name: axes for name, axes in free.axes.items() if name in inputs})
    for called, size in sizes_of(arguments, mine).items():
        other = size - 1 if size > 1 else size + 1
        again = outputs_of(module, sized(arguments, mine, {called: other}), inputs)
        for name, value in outputs.items():
            if again[name].dim() != value.dim():
                raise ModelError(
                    f"output {name!r} has {value.dim()} axes at {called} {size}, {again[name].dim()} at {other}"
                )
            for axis in range(value.dim()):
                if again[name].shape[axis] != value.shape[axis]:
                    same = (value.shape[axis], again[name].shape[axis]) == (size, other)
                    found[name][axis] = called if same else f"{name}_{axis}"
    return found


def _require_tensors(outputs: dict[str, Tensor]) -> None:
    if not outputs:
        raise ModelError("the network returns nothing: there is no output to export")
    for name, value in outputs.items():
        if not isinstance(value, Tensor):
            raise ModelError(f"output {name!r} is a {type(value).__name__}, not a tensor: return tensors only")


@contextlib.contextmanager
def _traceable() -> Iterator[None]:
    """Keep nn.MultiheadAttention off its fused eval-mode kernel, which has no ONNX form."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what is known and no news: the exporter's deprecation, which is deliberate, and its tracer's hints.

    Before an error it also prints the whole graph to standard output, from C++, whatever the log level.
    """
    log = torch._C._jit_onnx_log
    torch._C._jit_onnx_log = lambda *_: None
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            for message in ("You are using the legacy TorchScript", "The feature will be removed"):
                warnings.filterwarnings("ignore", message=message, category=DeprecationWarning)
            warnings.simplefilter("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
            # of recurrent layers whose initial state has a fixed size; parity is checked at other batch sizes
            warnings.filterwarnings("ignore", message="Exporting a model to ONNX with a batch_size other than 1")
            yield
    finally:
        torch._C._jit_onnx_log = log
