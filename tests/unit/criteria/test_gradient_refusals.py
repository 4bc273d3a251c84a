"""Where SNIP and GraSP have no meaning they say so, with the layer and what to choose instead."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparsify_deploy import menu
from sparsify_deploy.errors import DataError, ModelError
from sparsify_deploy.sparsity.mask import Mask

ROWS = {"input": torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), "target": torch.arange(6) % 3}


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch["input"]), batch["target"])


def scorer(name: str, model: nn.Module, batches: object = (ROWS,), loss_fn: object = loss) -> object:
    criterion = menu.entry("criteria", name)
    return criterion.prepare(model, batches, loss_fn, criterion.Params(), inputs=("input",), seed=0)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


@pytest.fixture(params=["snip", "grasp"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_layer_the_loss_does_not_see(name: str) -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.spare = mlp(), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.spare(x)
            return self.body(x)

    with pytest.raises(ModelError, match=r"does not depend on spare\.weight.*synflow, magnitude or random"):
        scorer(name, Spare())(None)


def test_a_zero_initialised_head_names_what_it_cuts_off(name: str) -> None:
    model = mlp()
    nn.init.zeros_(model[2].weight)
    with pytest.raises(ModelError, match=r"all scores of .*2\.weight are 0, because.*zero-initialised"):
        scorer(name, model)(None)


def test_outputs_that_are_not_float(name: str) -> None:
    class Votes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).argmax(1)

    with pytest.raises(ModelError, match=r"no output of the model is float.*magnitude or random"):
        scorer(name, Votes())(None)


def test_a_loss_without_gradient(name: str) -> None:
    with pytest.raises(ModelError, match=r"no gradient for any weight"):
        scorer(name, mlp(), loss_fn=lambda m, b: loss(m, b).detach())(None)


def test_a_loss_that_is_not_finite(name: str) -> None:
    model = mlp()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"the loss is nan"):
        scorer(name, model)(None)


def test_scores_that_are_not_finite_name_the_layer(name: str) -> None:
    # the square root's slope at 0 is infinite, its value is not
    with pytest.raises(ModelError, match=r"scores of 0\.weight are NaN or infinite"):
        scorer(name, mlp(), loss_fn=lambda m, b: loss(m, b) + (m[0].weight * 0).sum().abs().sqrt())(None)


def test_no_examples(name: str) -> None:
    with pytest.raises(DataError, match="got none"):
        scorer(name, mlp(), batches=[])(None)


def test_a_forward_that_fails_names_the_layer_and_one_that_runs_out_of_memory_is_no_model_error(name: str) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    one = {key: value[:1] for key, value in ROWS.items()}
    with pytest.raises(ModelError, match=r"on 1 training examples.*layer 1 failed: Expected more than 1 value"):
        scorer(name, model, batches=[one])(None)

    def full(model: nn.Module, batch: object) -> Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(RuntimeError, match="allocate"):
        scorer(name, model, loss_fn=full)(None)


def test_a_network_pruned_until_nothing_passes_is_refused_and_one_dead_layer_is_not(name: str) -> None:
    model = mlp()
    find = scorer(name, model)
    found = find(Mask({"0.weight": torch.zeros(7, 5, dtype=torch.bool)}))
    assert set(found) == {"0.weight", "2.weight"}
    whole = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in model.named_parameters() if n.endswith("weight")}
    with pytest.raises(ModelError, match=r"at density 0\.0000.*keep more weights"):
        find(Mask(whole))


def test_what_cannot_be_differentiated_twice() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return torch.cdist(self.body(x), torch.eye(3))

    with pytest.raises(ModelError, match=r"GraSP differentiates the network twice, which failed.*snip, synflow"):
        scorer("grasp", Model())(None)
    assert scorer("snip", Model())(None)["body.0.weight"].any()


def test_evaluation_mode_but_for_batch_norm_so_that_dropout_does_not_count(name: str) -> None:
    torch.manual_seed(0)
    modes: list[list[bool]] = []
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3))
    plain = nn.Sequential(model[0], model[1], model[2], model[4])

    def watching(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        modes.append([module.training for module in model])
        return loss(model, batch)

    found = list(scorer(name, model, loss_fn=watching)(None).values())
    assert all(mode == [False, True, False, False, False] for mode in modes)
    assert all(torch.equal(a, b) for a, b in zip(found, scorer(name, plain)(None).values(), strict=True))


def test_synflow_points_to_them() -> None:
    criterion = menu.entry("criteria", "synflow")
    with pytest.raises(ModelError, match=r"choose init\.criterion snip, grasp, magnitude or random"):
        criterion.score(mlp(), [ROWS], None, criterion.Params(), inputs=("input",))
