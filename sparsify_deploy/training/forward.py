"""How the forward pass of a step runs: compiled or not, in which memory format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsify_deploy.errors import EnvironmentProblem, ModelError, is_out_of_memory


def compiled(model: nn.Module) -> nn.Module:
    """The model with its forward by torch.compile, as one graph for one shape of batch, compiled in its first call.

    Code compiled before is forgotten: one process trains several networks of one class.
    """
    torch.compiler.reset()
    made: Any = torch.compile(model, fullgraph=True, dynamic=False)
    assert isinstance(made, nn.Module)
    return made


@contextmanager
def compiling() -> Iterator[None]:
    """Around a step of a `compiled` model: what torch.compile cannot do as one line, and nothing runs in its place."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        yield
    except (TorchDynamoException, InvalidCxxCompiler) as error:
        if is_out_of_memory(error):
            raise
        if "InvalidCxxCompiler" in f"{type(error).__name__} {error}":
            raise EnvironmentProblem(
                "training.compile needs a C++ compiler and finds none that works: install g++, name one in CXX, or "
                "set compile false"
            ) from error
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(
            f"training.compile: torch.compile cannot do this network as one graph ({text[:160]}): set compile false"
        ) from error


def channels_last_(model: nn.Module) -> None:
    """4-D weights and buffers in channels-last memory format, with the values they have."""
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def contiguous_(model: nn.Module) -> None:
    """4-D weights and buffers back in the format they are saved in."""
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def laid_out(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`batch` with its 4-D floats in channels-last memory format."""
    return {
        name: value.contiguous(memory_format=torch.channels_last)
        if value.ndim == 4 and value.is_floating_point()
        else value
        for name, value in batch.items()
    }
