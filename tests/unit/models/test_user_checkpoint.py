"""What is said of a file that is no checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from sparsify_deploy.errors import ModelError
from sparsify_deploy.models._checkpoint import load_checkpoint


def test_noise_is_called_damaged_without_advice_to_run_code(tmp_path: Path) -> None:
    path = tmp_path / "noise.pt"
    path.write_bytes(b"\x9b\x00\x01noise")
    with pytest.raises(ModelError) as error:
        load_checkpoint(nn.Linear(2, 2), path)
    assert str(error.value).endswith("damaged or cut short (UnpicklingError: Unsupported operand 155)")
