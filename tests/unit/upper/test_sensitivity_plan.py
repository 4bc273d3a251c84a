"""Where the sensitivity of the layers is measured, who takes it, and what that leaves as it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from sparsify_deploy.plan import Plan, PlannedStep, plan
from sparsify_deploy.recipe import NM, Recipe
from sparsify_deploy.stages.sensitivity import Sensitivity

Make = Callable[..., Recipe]
WORST = {"keep_worst_dense": 2, "fine_tune": {"steps": 6}}


def ids(found: Plan) -> list[str]:
    return [step.id for step in found.steps]


def step(found: Plan, identifier: str) -> PlannedStep:
    (only,) = [s for s in found.steps if s.id == identifier]
    return only


def measured(found: Plan, branch: str = "sparse") -> Sensitivity:
    stage = step(found, f"{branch}/sensitivity").stage
    assert isinstance(stage, Sensitivity)
    return stage


def test_keeping_the_worst_dense_measures_them_right_before_the_projection_and_hands_it_over(recipe: Make) -> None:
    found = plan(recipe(nm=WORST))
    assert ids(found)[ids(found).index("sparse/sensitivity") + 1] == "sparse/project_nm"
    assert not [i for i in ids(found) if i == "dense/sensitivity"]
    taken = step(found, "sparse/project_nm").inputs["sensitivity"]
    assert (taken.step, taken.output) == ("sparse/sensitivity", "sensitivity")
    trained = {name: (ref.step, ref.output) for name, ref in step(found, "sparse/sensitivity").inputs.items()}
    assert trained == {"weights": ("sparse/train", "weights"), "mask": ("sparse/train", "mask")}
    assert plan(recipe(nm=WORST), sensitivity=True).steps == found.steps


def test_asking_for_it_adds_one_step_and_changes_no_other(recipe: Make) -> None:
    without, asked = plan(recipe()), plan(recipe(), sensitivity=True)
    assert "sparse/sensitivity" not in ids(without)
    assert [s for s in asked.steps if s.id != "sparse/sensitivity"] == list(without.steps)
    assert asked.rows == without.rows
    assert ids(asked)[ids(asked).index("sparse/sensitivity") + 1] == "sparse/project_nm"
    assert not [s.id for s in asked.steps if "sensitivity" in s.inputs]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"nm": None}, "sparse/sensitivity"),
        ({"nm": None, "init": None, "train": {"method": "dense"}, "sparsity": None}, "dense/sensitivity"),
        ({"nm": None, "init": None, "train": None, "sparsity": None}, "dense/sensitivity"),
        ({"dense_branch": False}, "sparse/sensitivity"),
        ({"init": None, "train": None, "sparsity": None}, "sparse/sensitivity"),
    ],
)
def test_any_recipe_can_be_asked_in_one_branch(recipe: Make, changes: dict[str, object], expected: str) -> None:
    found = plan(recipe(**changes), sensitivity=True)
    assert [i for i in ids(found) if i.endswith("sensitivity")] == [expected]


def test_what_leads_to_it_is_all_that_it_needs_and_nothing_else(recipe: Make) -> None:
    found = plan(recipe(), sensitivity=True).leading_to("sensitivity")
    assert ids(found) == ["sparse/init_mask", "sparse/train", "sparse/sensitivity"]
    assert found.rows == ()
    assert plan(recipe()).leading_to("sparse/train.report").rows == ("sparse/train.report",)
    taught = recipe(nm=WORST, distillation={})
    assert "dense/train" in ids(plan(taught).leading_to("project_nm"))


@pytest.mark.parametrize(
    "changes",
    [
        {"nm": {"fine_tune": {"steps": 9}}},
        {"nm": {"fill_batches": 3, "fine_tune": {"steps": 6}}},
        {"nm": WORST},
        {"nm": {"via": ["4:8"], "fine_tune": {"steps": 6}}},
        {"quantize": {"qat": {"steps": 9}}},
        {"quantize": None},
        {"gates": {"max_drop": 0.1}},
    ],
)
def test_settings_that_it_does_not_feel_do_not_repeat_it(recipe: Make, changes: dict[str, object]) -> None:
    assert measured(plan(recipe(**changes), sensitivity=True)) == measured(plan(recipe(), sensitivity=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"nm": {"pattern": "1:4", "fine_tune": {"steps": 6}}},
        {"nm": {"layers": "pattern_possible", "fine_tune": {"steps": 6}}},
        {"nm": {"keep_dense": ["fc"], "fine_tune": {"steps": 6}}},
        {"quantize": {"calibration_batches": 3}},
        {"quantize": {"keep_float": ["fc"]}},
        {"quantize": {"residual": False}},
        {"gates": {"metric": "accuracy"}},
        {"seed": 4},
    ],
)
def test_settings_that_it_feels_are_its_fields(recipe: Make, changes: dict[str, object]) -> None:
    assert measured(plan(recipe(**changes), sensitivity=True)) != measured(plan(recipe(), sensitivity=True))


def test_without_an_nm_section_it_is_the_forecasts_two_of_four(recipe: Make) -> None:
    assert measured(plan(recipe(nm=None), sensitivity=True)).nm == NM()


def test_its_settings_say_how_many_examples(recipe: Make) -> None:
    stage = measured(plan(recipe(), sensitivity=True))
    assert stage.examples == 2048
    assert dataclasses.replace(stage, examples=64) != stage
