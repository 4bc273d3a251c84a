"""Gradients of the training loss at `W * mask`, and Hessian-gradient products, on a model that is left as found.

BatchNorm uses the statistics of each batch, as at the first training step and in the authors' code of SNIP and GraSP
(at initialisation its running statistics describe nothing); everything else is in evaluation mode, so dropout and
stochastic depth add no noise. The loss is the mean over all scoring examples however they are cut into batches; only
BatchNorm sees the cut. The graph of one batch is alive at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from sparsify_deploy.criteria._flow import watch
from sparsify_deploy.errors import DataError, ModelError, is_out_of_memory
from sparsify_deploy.sparsity.layers import prunable

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from sparsify_deploy.sparsity.mask import Mask
    from sparsify_deploy.types import Batch, LossFn

    Weights = dict[str, nn.Parameter]
    Sums = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Probe:
    """A network with its loss and the examples that score it; `criterion` and `instead` are words for errors.

    `temperature` divides every float output of the network before the loss sees it.
    """

    criterion: str
    instead: str
    model: nn.Module
    batches: tuple[Batch, ...]
    loss_fn: LossFn
    inputs: tuple[str, ...]
    seed: int
    temperature: float = 1.0

    @contextmanager
    def at(self, mask: Mask | None) -> Iterator[Weights]:
        """The prunable weights at `W * mask`, requiring grad; model, buffers, flags and RNG are put back on leaving."""
        weights = {layer.parameter: layer.weight for layer in prunable(self.model)}
        if not weights:
            raise ModelError(f"{self.criterion} scores Conv and Linear weights, and the model has none")
        with ExitStack() as undo:
            undo.enter_context(_random_states_kept(self.model))
            undo.callback(_put_back, [(b, b.detach().clone()) for b in self.model.buffers()])
            undo.callback(_set_modes, [(module, module.training) for module in self.model.modules()])
            for weight in weights.values():
                undo.callback(weight.requires_grad_, weight.requires_grad)
                weight.requires_grad_(True)
            if mask is not None:
                pruned = {name: weight for name, weight in weights.items() if name in mask}
                undo.callback(_put_back, [(w, w.detach().clone()) for w in pruned.values()])
                with torch.no_grad():
                    for name, weight in pruned.items():
                        weight.mul_(mask[name].to(weight.device))
            for module in self.model.modules():
                # cuDNN has no backward pass for recurrent layers in evaluation mode; nothing but dropout depends on it
                recurrent = isinstance(module, nn.RNNBase) and not module.dropout
                module.training = recurrent or isinstance(module, _BatchNorm)
            undo.enter_context(torch.enable_grad())
            yield weights

    def gradients(self, weights: Weights) -> Sums:
        """The gradient of the mean loss for each weight, in float32 or wider; ModelError where none reaches a layer."""
        sums, reached = _zeros(weights), set()
        for loss in self._losses():
            with self._differentiating("the network"):
                found = _grad(loss, weights, create_graph=False)
            for name, part in found.items():
                sums[name] += part
                reached.add(name)
        if missed := [name for name in weights if name not in reached]:
            raise ModelError(
                f"{self.criterion}: the loss does not depend on {', '.join(missed)}, so no gradient says what they are "
                f"worth: {self.instead}"
            )
        return sums

    def hessian_times(self, weights: Weights, vector: Sums) -> Sums:
        """H v, with H the Hessian of the mean loss over the prunable weights alone and v held constant."""
        sums = _zeros(weights)
        # flash attention has no second derivative
        with sdpa_kernel(SDPBackend.MATH):
            for loss in self._losses():
                with self._differentiating("the network twice"):
                    first = _grad(loss, weights, create_graph=True)
                    parts = [(vector[n].to(g.dtype) * g).sum() for n, g in first.items() if g.requires_grad]
                    if not parts:  # a loss linear in the weights has H = 0
                        continue
                    second = _grad(torch.stack(parts).sum(), weights, create_graph=False)
                for name, part in second.items():
                    sums[name] += part
        return sums

    @contextmanager
    def _differentiating(self, what: str) -> Iterator[None]:
        """ModelError where torch cannot, such as behind a value that was overwritten in place."""
        try:
            yield
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise ModelError(
                f"{self.criterion} differentiates {what}, which failed: {error}: {self.instead}"
            ) from error

    def check(self, scores: Mapping[str, Tensor], mask: Mask | None) -> None:
        """ModelError on scores that say nothing, naming the layer.

        Once weights are pruned a layer may well have zeros alone: its neighbour has collapsed, which is reported.
        """
        for name, score in scores.items():
            if bad := int(score.numel() - torch.isfinite(score).sum()):
                raise ModelError(
                    f"{self.criterion}: {bad} of {score.numel()} scores of {name} are NaN or infinite: check its "
                    f"weights and the loss, or {self.instead}"
                )
        dead = [name for name, score in scores.items() if not bool(score.any())]
        whole = mask is None or mask.density == 1.0
        if dead and (whole or len(dead) == len(scores)):
            when = "" if whole or mask is None else f" at density {mask.density:.4f}"
            raise ModelError(
                f"{self.criterion}: all scores of {', '.join(dead)} are 0{when}, because no gradient reaches the layer "
                f"or its weights are 0 (a zero-initialised layer or BatchNorm cuts what lies before it): initialise "
                f"otherwise, keep more weights, or {self.instead}"
            )

    def _losses(self) -> Iterator[Tensor]:
        """For each batch its share of the mean loss, with a graph; the generator is seeded alike on every pass."""
        counts = [len(batch[self.inputs[0]]) for batch in self.batches]
        total = sum(counts)
        if total == 0:
            raise DataError(f"{self.criterion} scores weights by the loss of training examples, and got none")
        for number, (batch, count) in enumerate(zip(self.batches, counts, strict=True)):
            _seed(self.model, self.seed + number)
            yield self._loss(batch) * (count / total)

    def _loss(self, batch: Batch) -> Tensor:
        running: list[str] = []
        hooks = watch(self.model, running)
        hooks.append(self.model.register_forward_hook(self._outputs_hook()))
        try:
            loss = self.loss_fn(self.model, batch)
        except (RuntimeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            place = "the loss" if not running else f"layer {running[-1]}" if running[-1] else "the model's own forward"
            raise ModelError(
                f"{self.criterion} runs the model on {len(batch[self.inputs[0]])} training examples, BatchNorm on "
                f"batch statistics, and {place} failed: {error}"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        if not loss.requires_grad:
            raise ModelError(f"{self.criterion}: the loss has no gradient for any weight: {self.instead}")
        if not bool(torch.isfinite(loss)):
            raise ModelError(
                f"{self.criterion}: the loss is {float(loss.detach())}, which ranks no weight: {self.instead}"
            )
        return loss

    def _outputs_hook(self) -> Callable[..., Any]:
        def hook(module: nn.Module, arguments: Any, outputs: Any) -> Any:
            if not _has_floats(outputs):
                raise ModelError(
                    f"{self.criterion} needs a gradient, and no output of the model is float: {self.instead}"
                )
            return None if self.temperature == 1.0 else _divided(outputs, self.temperature)

        return hook


def _grad(value: Tensor, weights: Weights, *, create_graph: bool) -> Sums:
    """d value / d weight, for the weights that `value` depends on."""
    found = torch.autograd.grad(value, list(weights.values()), create_graph=create_graph, allow_unused=True)
    return {name: part for name, part in zip(weights, found, strict=True) if part is not None}


def _zeros(weights: Weights) -> Sums:
    """float32 at least: sums of many small terms lose too much in half precision."""
    return {
        name: torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32), requires_grad=False)
        for name, w in weights.items()
    }


def _has_floats(outputs: Any) -> bool:
    if isinstance(outputs, torch.Tensor):
        return outputs.is_floating_point()
    if isinstance(outputs, Mapping):
        return any(_has_floats(value) for value in outputs.values())
    return isinstance(outputs, (tuple, list)) and any(_has_floats(value) for value in outputs)


def _divided(outputs: Any, temperature: float) -> Any:
    if isinstance(outputs, torch.Tensor):
        return outputs / temperature if outputs.is_floating_point() else outputs
    if isinstance(outputs, Mapping):
        return {name: _divided(value, temperature) for name, value in outputs.items()}
    if isinstance(outputs, (tuple, list)):
        return tuple(_divided(value, temperature) for value in outputs)
    return outputs


@torch.no_grad()
def _put_back(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, saved in pairs:
        tensor.copy_(saved)


def _set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training


def _gpus(model: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


@contextmanager
def _random_states_kept(model: nn.Module) -> Iterator[None]:
    with torch.random.fork_rng(devices=_gpus(model)):
        yield


def _seed(model: nn.Module, seed: int) -> None:
    # torch.manual_seed would also seed GPUs whose state nobody has saved
    torch.default_generator.manual_seed(seed)
    for index in _gpus(model):
        torch.cuda.default_generators[index].manual_seed(seed)
