"""The stage: every criterion, samples per class, patterns, and what it says of layers left out or collapsed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparsify_deploy import menu
from sparsify_deploy.errors import ModelError
from sparsify_deploy.recipe import Data, Init, Model, TaskSection
from sparsify_deploy.sparsity.mask import Mask
from sparsify_deploy.sparsity.nm import is_nm
from sparsify_deploy.stages.init_mask import InitMask
from sparsify_deploy.stages.subject import Subject
from sparsify_deploy.types import Context, Json

LENET = {"name": "lenet-300-100", "image_size": 8}


class Listener:
    """Keeps what a stage tells."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def update(self, label: str, done: int, total: int, note: str = "") -> None:
        pass

    def say(self, message: str) -> None:
        self.said.append(message)


def stage(init: dict[str, Json], sparsity: float | None = 0.9, model: dict[str, Json] = LENET) -> InitMask:
    subject = Subject(
        Model.model_validate({"source": "builtin", "params": model}), Data(params=None), TaskSection(params=None), 0
    )
    return InitMask(subject, Init.model_validate(init), sparsity, 16)


def run(which: InitMask, out: Path) -> tuple[dict[str, Json], Mask, list[str]]:
    listener, threads = Listener(), torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        facts = which.run({}, out, Context(progress=listener, threads=1, device="cpu"))
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
    return dict(facts), Mask.load(out / "mask.safetensors"), listener.said


@pytest.mark.parametrize("criterion", menu.names("criteria"))
@pytest.mark.parametrize("allocation", ["global", "uniform", "erk"])
def test_any_criterion_with_any_allocation(criterion: str, allocation: str, tmp_path: Path) -> None:
    facts, mask, _ = run(stage({"criterion": criterion, "allocation": allocation, "batches": 2}), tmp_path)
    assert mask.density == pytest.approx(0.1, abs=1e-4)
    assert (facts["criterion"], facts["allocation"], facts["init_pattern"]) == (criterion, allocation, None)
    assert facts["examples"] == (32 if criterion in ("snip", "grasp") else 0)
    assert facts["rounds"] == (100 if criterion == "synflow" else 1)


def test_samples_per_class(tmp_path: Path) -> None:
    facts, few, _ = run(stage({"criterion": "snip", "samples_per_class": 3}), tmp_path)
    assert facts["examples"] == 30
    assert few != run(stage({"criterion": "snip", "samples_per_class": 4}), tmp_path)[1]
    assert few == run(stage({"criterion": "snip", "samples_per_class": 3}), tmp_path)[1]


@pytest.mark.parametrize("criterion", menu.names("criteria"))
def test_a_pattern_has_exactly_n_of_every_m_and_names_the_layers_it_leaves_dense(
    criterion: str, tmp_path: Path
) -> None:
    resnet = {"name": "resnet8", "width": 4, "in_channels": 1}
    init = {"criterion": criterion, "pattern": "2:4", "keep_dense": ["*fc*"], "samples_per_class": 2}
    which = stage(init, None, resnet)
    which.preflight()
    facts, mask, said = run(which, tmp_path)
    (first,) = facts["no_pattern"]
    assert "C_in 1 is not a multiple of 4" in facts["no_pattern"][first]
    assert any(first in line and "stays dense, no 2:4" in line for line in said)
    assert f"{first}.weight" not in mask
    assert len(facts["kept_dense"]) == 1
    assert not any("fc" in name for name in mask)
    assert (facts["init_pattern"], facts["allocation"], facts["sparsity_asked"], facts["rounds"]) == (
        "2:4",
        None,
        None,
        1,
    )
    for name, tensor in mask.items():
        assert is_nm(tensor, 2, 4), name
        assert int(tensor.sum()) * 2 == tensor.numel()
    assert facts["sparsity_of_masked_layers"] == 0.5


def test_a_pattern_no_layer_can_take_is_refused_before_anything_runs() -> None:
    with pytest.raises(ModelError, match=r"no layer can take init.pattern 3:7 \(.*C_in 64 is not a multiple of 7"):
        stage({"pattern": "3:7"}, None).preflight()
    with pytest.raises(ModelError, match=r"all are kept dense"):
        stage({"pattern": "2:4", "keep_dense": ["*"]}, None).preflight()


@pytest.mark.parametrize("glorot", [False, True])
def test_collapse_of_lenet_300_100_at_two_percent_depends_on_its_initialisation(glorot: bool, tmp_path: Path) -> None:
    model: dict[str, Json] = {"source": "builtin", "params": {"name": "lenet-300-100", "image_size": 28}}
    if not glorot:  # which is the built-in network's own
        network = menu.entry("models", "builtin").build(Model.model_validate(model).params)
        torch.manual_seed(0)
        for module in network.modules():
            if isinstance(module, torch.nn.Linear):
                module.reset_parameters()
        save_file(network.state_dict(), tmp_path / "default.safetensors")
        model["checkpoint"] = str(tmp_path / "default.safetensors")
    subject = Subject(
        Model.model_validate(model), Data.model_validate({"params": {"size": 28}}), TaskSection(params=None), 0
    )
    init = Init.model_validate({"criterion": "magnitude"})
    facts, mask, said = run(InitMask(subject, init, 0.98, 16), tmp_path)
    if glorot:
        assert (facts["collapsed"], said) == ([], [])
        return
    assert facts["collapsed"] == ["fc1.weight"]
    assert facts["densities"]["fc1.weight"] == 0
    assert not mask["fc1.weight"].any()
    assert said == ["layer collapse: no weight is left in fc1.weight"]
