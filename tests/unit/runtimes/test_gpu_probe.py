"""What the driver answers, through a stand-in driver library."""

from __future__ import annotations

import ctypes

import pytest

from sparsify_deploy.runtimes import _gpu


class FakeDriver:
    def __init__(self, code=0, capabilities=((8, 6), (9, 0))):
        self.code, self.capabilities = code, capabilities

    def cuInit(self, flags):
        return self.code

    def cuDeviceGetCount(self, count):
        count._obj.value = len(self.capabilities)

    def cuDeviceGet(self, device, index):
        device._obj.value = index

    def cuDeviceGetName(self, name, size, device):
        name.value = b"NVIDIA Test %d" % device.value

    def cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = self.capabilities[device.value][{75: 0, 76: 1}[attribute]]


@pytest.mark.parametrize(
    ("driver", "gpus", "reason"),
    [
        (FakeDriver(), [["NVIDIA Test 0", "sm86"], ["NVIDIA Test 1", "sm90"]], None),
        (FakeDriver(capabilities=()), [], "shows no device"),
        (FakeDriver(code=100), [], "cuInit answered 100"),
    ],
)
def test_devices_and_reasons(monkeypatch, driver, gpus, reason):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    answer = _gpu.probe(None)
    assert answer["gpus"] == gpus
    assert answer["reason"] is None if reason is None else reason in answer["reason"]


def test_no_driver_is_a_reason(monkeypatch):
    def absent(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert "libcuda.so.1 is not installed" in _gpu.probe(None)["reason"]
