"""Networks of timm and torchvision by name, and what is said where that is not possible."""

from __future__ import annotations

import urllib.error
from types import ModuleType
from typing import Any

import pytest
import torch

from sparsify_deploy.errors import EnvironmentProblem, MissingExtra, ModelError
from sparsify_deploy.models import timm as timm_source
from sparsify_deploy.models import torchvision as torchvision_source
from sparsify_deploy.models._zoo import imported


def test_a_torchvision_network_has_the_classes_asked_for(torchvision: ModuleType) -> None:
    model = torchvision_source.build(torchvision_source.Params(name="resnet18", classes=7))
    assert model.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_a_timm_network_has_the_classes_channels_and_arguments_asked_for(torchvision: ModuleType) -> None:
    params = timm_source.Params(name="resnet10t", classes=5, in_channels=1, arguments={"drop_rate": 0.25})
    model = timm_source.build(params)
    assert model.eval()(torch.zeros(2, 1, 32, 32)).shape == (2, 5)
    assert model.drop_rate == 0.25


def test_the_random_state_alone_decides_the_weights(torchvision: ModuleType) -> None:
    def weight(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return timm_source.build(timm_source.Params(name="resnet10t")).state_dict()["conv1.0.weight"]

    assert torch.equal(weight(3), weight(3))
    assert not torch.equal(weight(3), weight(4))


@pytest.mark.parametrize("source", [timm_source, torchvision_source])
def test_an_unknown_name_gets_a_near_one(torchvision: ModuleType, source: Any) -> None:
    with pytest.raises(ModelError, match=r"has no network 'resnet5O'; did you mean .*'resnet50'"):
        source.build(source.Params(name="resnet5O"))
    with pytest.raises(ModelError, match=r"none of its \d+ names is close$"):
        source.build(source.Params(name="zzzzzzzz"))


@pytest.mark.parametrize("source", [timm_source, torchvision_source])
def test_an_unknown_argument_is_one_line(torchvision: ModuleType, source: Any) -> None:
    with pytest.raises(ModelError, match=r"^model.params: \w+ cannot make resnet18: .*colour"):
        source.build(source.Params(name="resnet18", arguments={"colour": 3}))


def test_pretrained_torchvision_weights_have_their_own_classes() -> None:
    with pytest.raises(ValueError, match="the pretrained weights have 1000 classes"):
        torchvision_source.Params(name="resnet18", classes=10, pretrained=True)


@pytest.mark.parametrize("source", [timm_source, torchvision_source])
def test_without_a_network_the_way_out_is_a_local_file(
    torchvision: ModuleType, monkeypatch: pytest.MonkeyPatch, source: Any
) -> None:
    import timm

    def no_network(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(timm, "create_model", no_network)
    monkeypatch.setattr(torchvision.models, "get_model", no_network)
    with pytest.raises(EnvironmentProblem, match=r"cannot be downloaded .*give a local file as model.checkpoint"):
        source.build(source.Params(name="resnet18", pretrained=True))


def test_a_package_that_is_not_there_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingExtra, match=r"pip install 'sparsify-deploy\[vision\]'"):
        imported("sparsify_deploy_no_such_zoo")


def test_a_package_that_does_not_load_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "broken_zoo.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EnvironmentProblem, match="nms does not exist; install torch and torchvision from one index"):
        imported("broken_zoo")
