"""What a recipe may not ask of its training, each a line at its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsify_deploy.errors import RecipeError
from sparsify_deploy.recipe import Recipe
from sparsify_deploy.recipe_source import load
from sparsify_deploy.training.image_settings import Augment, from_torchvision, name_of

BASE = "version: 1\nmodel: {params: {name: resnet8, in_channels: 1}}\ndata: {}\n"


def read(folder: Path, text: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(BASE + text, encoding="utf-8")
    return load(path)


def mistakes_of(folder: Path, text: str) -> list[str]:
    try:
        read(folder, text)
    except RecipeError as error:
        return [line.partition("recipe.yaml")[2].lstrip(":") for line in error.lines]
    return []


IMP = "sparsity: 0.5\ntrain: {method: imp}\n"


@pytest.mark.parametrize(
    "text",
    [
        "training: {steps: 4, ema: {}, channels_last: true, compile: true, keep: best, mixup: 0.2, cutmix: 1.0}\n",
        "training: {steps: 4, early_stop: {patience: 3, min_delta: 0.01}, evaluate_every: 0.5}\nnm: {fine_tune: {}}\n",
        f"training: {{steps: 4, ema: {{decay: 0.99}}, evaluate_every: 1}}\n{IMP}",
        "training: {steps: 4, compile: true}\nquantize: {qat: {compile: false}}\n",
        "training: {steps: 4, compile: true}\nquantize: {}\n",
        "training: {steps: 4, keep: best}\nsparsity: 0.5\ntrain: {method: gradual, training: {keep: last}}\n"
        "nm: {fine_tune: {}}\n",
        "training: {steps: 4, early_stop: {}}\ntrain: {method: sr_ste, training: {early_stop: null}}\n",
        "training: {steps: 4, mixup: 0.1}\ntask: {name: regression}\nnm: {fine_tune: {mixup: null}}\n",
    ],
)
def test_these_go_together(tmp_path: Path, text: str) -> None:
    assert mistakes_of(tmp_path, text) == []


@pytest.mark.parametrize(
    ("text", "place", "says"),
    [
        (
            "training: {steps: 4, ema: {decay: 1.5}}\n",
            "4:35: training.ema.decay",
            "expected a number below 1, found 1.5",
        ),
        ("training: {steps: 4, ema: {decay: 0}}\n", "4:35: training.ema.decay", "expected a number above 0"),
        ("training: {steps: 4, ema: {decai: 0.9}}\n", "4:28: training.ema.decai", "did you mean 'decay'?"),
        ("training: {steps: 4, ema: 0.9}\n", "4:27: training.ema", "expected a mapping"),
        ("training: {steps: 4, keep: bets}\n", "4:28: training.keep", "did you mean 'best'?"),
        ("training: {steps: 4, chanels_last: true}\n", "4:22: training.chanels_last", "did you mean 'channels_last'?"),
        ("training: {steps: 4, compile: 1}\n", "4:31: training.compile", "expected true or false"),
        ("training: {steps: 4, mixup: -1}\n", "4:29: training.mixup", "expected a number above 0"),
        (
            "training: {steps: 4, early_stop: {patience: 0}}\n",
            "4:45: training.early_stop.patience",
            "expected 1 or more",
        ),
        ("training: {steps: 4, evaluate_every: 0}\n", "4:38: training.evaluate_every", "expected a number above 0"),
        (
            f"training: {{steps: 4, keep: best}}\n{IMP}",
            "4:28: training.keep",
            "has no meaning with train.method imp, pruned as asked at its end only: leave it out",
        ),
        (
            f"training: {{steps: 4, early_stop: {{}}}}\n{IMP}",
            "4:22: training.early_stop",
            "no meaning with train.method imp",
        ),
        (
            "training: {steps: 4}\nsparsity: 0.5\ntrain: {method: gradual, training: {keep: best}}\n",
            "6:43: train.training.keep",
            "no meaning with train.method gradual",
        ),
        (
            "training: {steps: 4, keep: best}\ntrain: {method: sr_ste}\n",
            "4:28: training.keep",
            "no meaning with train.method sr_ste",
        ),
        (
            "training: {steps: 4, mixup: 0.2}\ntask: {name: regression}\ntrain: {method: dense}\n",
            "4:29: training.mixup",
            "mixes labels, and task regression knows no mixed ones: leave it out",
        ),
        (
            "training: {steps: 4}\ntask: {name: regression}\nnm: {fine_tune: {cutmix: 1.0}}\n",
            "6:26: nm.fine_tune.cutmix",
            "mixes labels, and task regression",
        ),
        (
            "training: {steps: 4, compile: true}\nquantize: {qat: {}}\n",
            "4:31: training.compile",
            "nvidia-modelopt's quantizers do not compile: set quantize.qat.compile false",
        ),
        (
            "quantize: {qat: {steps: 3, compile: true}}\n",
            "4:37: quantize.qat.compile",
            "nvidia-modelopt's quantizers do not compile",
        ),
        (
            "training: {steps: 4, compile: true}\nnm: {fine_tune: {}}\n"
            "distillation: {features: ['layer*'], phases: [fine_tune]}\n",
            "4:31: training.compile",
            "features of a compiled network cannot be read",
        ),
    ],
)
def test_each_mistake_is_a_line_at_its_place(tmp_path: Path, text: str, place: str, says: str) -> None:
    found = mistakes_of(tmp_path, text)
    assert len(found) == 1, found
    assert found[0].startswith(place), found
    assert says in found[0]


# -- the list of changes -------------------------------------------------------------------------------------------


def augmented(folder: Path, text: str) -> tuple[object, ...]:
    path = folder / "recipe.yaml"
    path.write_text(BASE.replace("data: {}", f"data: {{augment: {text}}}"), encoding="utf-8")
    data = load(path).data
    assert data is not None
    return data.augment


def test_a_name_alone_is_that_change_with_its_defaults(tmp_path: Path) -> None:
    short = augmented(tmp_path, "[crop, rand_augment, flip]")
    assert short == augmented(tmp_path, "[crop, {rand_augment: {num_ops: 2, magnitude: 9}}, flip]")
    assert [name_of(change) for change in short if isinstance(change, (str, Augment))] == [
        "crop",
        "rand_augment",
        "flip",
    ]
    assert from_torchvision(short) == ("rand_augment",)
    assert augmented(tmp_path, "[crop, flip]") == ("crop", "flip")


@pytest.mark.parametrize(
    ("text", "place", "says"),
    [
        ("[rand_agument]", "data.augment.0", "unknown name 'rand_agument'; did you mean 'rand_augment'?"),
        ("[crop, {randaugment: {}}]", "data.augment.1.randaugment", "did you mean 'rand_augment'?"),
        ("[{rand_augment: {magnitude: 99}}]", "data.augment.0.rand_augment.magnitude", "expected at most 30, found 99"),
        ("[{rand_augment: {strength: 9}}]", "data.augment.0.rand_augment.strength", "unknown key"),
        ("[{color_jitter: {hue: 0.7}}]", "data.augment.0.color_jitter.hue", "expected at most 0.5"),
        ("[{random_erasing: {scale: [0.5, 0.1]}}]", "data.augment.0", "a range goes from least to largest"),
        ("[{random_resized_crop: {scale: [0.5, 1.5]}}]", "data.augment.0", "scale is a part of the area, at most 1"),
        ("[{random_erasing: {}, rand_augment: {}}]", "data.augment.0", "name one change a list item"),
        ("[{}]", "data.augment.0", "name one change a list item"),
        ("[3]", "data.augment.0", "found 3"),
    ],
)
def test_a_change_that_is_none_is_a_line(tmp_path: Path, text: str, place: str, says: str) -> None:
    with pytest.raises(RecipeError) as error:
        augmented(tmp_path, text)
    (line,) = error.value.lines
    assert f" {place}: " in line
    assert says in line


def test_every_parameter_of_a_change_reaches_the_fingerprint() -> None:
    from sparsify_deploy.artifacts.fingerprint import canonical_text

    start = [Augment.model_validate({name: {}}) for name in Augment.model_fields]
    others = [
        *({"rand_augment": {"num_ops": 3}}, {"rand_augment": {"magnitude": 3}}),
        *({"random_erasing": {"probability": 0.1}}, {"random_erasing": {"scale": [0.1, 0.2]}}),
        *({"random_erasing": {"ratio": [0.5, 2.0]}}, {"random_resized_crop": {"ratio": [0.5, 2.0]}}),
        *({"random_resized_crop": {"scale": [0.5, 1.0]}}, {"color_jitter": {"hue": 0.1}}),
        *({"color_jitter": {name: 0.1}} for name in ("brightness", "contrast", "saturation")),
    ]
    texts = [canonical_text(change) for change in (*start, *map(Augment.model_validate, others))]
    assert len(set(texts)) == len(texts)
