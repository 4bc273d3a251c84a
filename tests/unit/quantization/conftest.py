"""Small networks and batches shared by the quantisation tests."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("modelopt")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def batches():
    """Three calibration batches of field `x`, `(4, 3, 8, 8)`."""
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(4, 3, 8, 8, generator=generator)} for _ in range(3)]


@pytest.fixture
def lively():
    """Give every BatchNorm statistics and affine parameters far from their defaults."""

    def change(model):
        generator = torch.Generator().manual_seed(2)
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.3, 3, generator=generator)
                if module.affine:
                    with torch.no_grad():
                        module.weight.normal_(generator=generator)
                        module.bias.normal_(generator=generator)
        return model

    return change
