"""Which output and which field a task reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsify_deploy.errors import DataError

TARGET = "target"


def usual_name(outputs: Mapping[str, Any]) -> str:
    """The only output, or `logits` among several, which they may lack."""
    return next(iter(outputs)) if len(outputs) == 1 else "logits"


def chosen_name(outputs: Mapping[str, Any], name: str | None) -> str:
    """`name`; None: the `usual_name`. `DataError` where there is no such output."""
    if name is None:
        name = usual_name(outputs)
    if name not in outputs:
        known = ", ".join(outputs) or "none"
        raise DataError(f"the model has no output {name!r} (it has {known}): name one in task.params.output")
    return name


def chosen_output(outputs: Mapping[str, Any], name: str | None) -> Any:
    """The output that `chosen_name` names."""
    return outputs[chosen_name(outputs, name)]


def target_of(batch: Mapping[str, Any]) -> Any:
    """The field `target`; `DataError` where the data lacks it."""
    if TARGET not in batch:
        raise DataError(f"the data has no field {TARGET!r} (it has {', '.join(batch) or 'none'})")
    return batch[TARGET]
