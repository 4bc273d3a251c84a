"""What `doctor` has to say of one thing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warn", "missing"]


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `advice` is empty where there is nothing to do, and else names the command that mends it."""

    name: str
    state: State
    detail: str
    advice: str = ""
