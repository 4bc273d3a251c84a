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
from sparsify_deploy.graph import file
from sparsify_deploy.graph.quantizers import place_quantizers_
from sparsify_deploy.graph.tidy import tidy_
from sparsify_deploy.types import outputs_of

if TYPE_CHECKING:
    from sparsify_deploy.types import Batch

_PROTOBUF_LIMIT_BYTES = 2**31 - 2**20


def export(
    module: nn.Module,
    example: Batch,
    inputs: Sequence[str],
    path: Path,
    *,
    opset: int = 17,
    dynamic_batch: bool = True,
) -> None:
    """Write `module` in eval mode to `path`, traced on the fields `inputs` of `example`, and judge the file.

    Graph inputs are named `inputs`, outputs as `outputs_of` names them, initializers as the parameters. With
    `dynamic_batch` axis 0 of every input and output is free, else it is the example's. Every part's mode is restored.

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
            axes = {name: {0: "batch"} for name, value in {**arguments, **outputs}.items() if value.dim()}
            torch.onnx.export(
                _Named(module, inputs),
                tuple(arguments.values()),
                str(path),
                dynamo=False,
                opset_version=opset,
                input_names=list(arguments),
                output_names=list(outputs),
                dynamic_axes=axes if dynamic_batch else None,
                do_constant_folding=False,  # it would put an anonymous transposed copy in place of a Linear's weight
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(f"{type(module).__name__} cannot be exported to ONNX opset {opset}: {reason}") from error
    finally:
        for part, mode in modes:
            part.training = mode
    written = file.load(path)
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
            yield
    finally:
        torch._C._jit_onnx_log = log
