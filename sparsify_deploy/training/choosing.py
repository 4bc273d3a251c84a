"""What measurements on the validation split decide: which weights a run ends with, and when it stops early."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sparsify_deploy.sparsity.mask import Mask
from sparsify_deploy.training.checkpoint import tensors_of

if TYPE_CHECKING:
    from sparsify_deploy.training.settings import Training
    from sparsify_deploy.types import Direction


class Choice:
    """The metric over the steps of one run, the best of it, and with `keep: best` the weights that had it.

    A value counts as better when it beats the best so far by more than `min_delta`; the first one always does.
    """

    def __init__(self, settings: Training, metric: str, direction: Direction) -> None:
        self.metric = metric
        self.curve: list[tuple[int, float]] = []
        self._keeps = settings.keep == "best"
        self._stop = settings.early_stop
        self._sign = 1.0 if direction == "higher" else -1.0
        self._best: tuple[int, float] | None = None
        self._tensors: dict[str, Tensor] | None = None
        self._mask: dict[str, Tensor] | None = None
        self._since = 0
        self._reference: float | None = None

    def see(self, step: int, value: float, model: nn.Module, mask: Mask | None) -> None:
        """Take in what the model, as it would end, measured after `step` optimizer steps."""
        self.curve.append((step, value))
        if self._best is None or self._sign * (value - self._best[1]) > 0.0:
            self._best = (step, value)
            if self._keeps:
                tensors = tensors_of(model)
                self._tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
                self._mask = dict(mask) if mask is not None else None
        least = self._stop.min_delta if self._stop is not None else 0.0
        if self._reference is None or self._sign * (value - self._reference) > least:
            self._reference, self._since = value, 0
        else:
            self._since += 1

    @property
    def stops(self) -> bool:
        """Whether too many measurements passed without a better one."""
        return self._stop is not None and self._since >= self._stop.patience

    @property
    def best(self) -> tuple[int, float]:
        """The step of the best value, the first of equal ones, and the value."""
        assert self._best is not None
        return self._best

    @property
    def kept(self) -> tuple[dict[str, Tensor], Mask | None] | None:
        """The tensors and the mask of the best step, where they are kept."""
        if self._tensors is None:
            return None
        return self._tensors, Mask(self._mask) if self._mask is not None else None

    def state_dict(self) -> dict[str, Any]:
        """Enough to go on exactly."""
        return {
            "curve": self.curve,
            "best": self._best,
            "tensors": self._tensors,
            "mask": self._mask,
            "since": self._since,
            "reference": self._reference,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Back to what `state_dict` told."""
        self.curve = [(step, value) for step, value in state["curve"]]
        self._best = tuple(state["best"]) if state["best"] is not None else None
        self._tensors, self._mask = state["tensors"], state["mask"]
        self._since, self._reference = state["since"], state["reference"]
