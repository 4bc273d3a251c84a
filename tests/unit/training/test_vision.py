"""torchvision's changes and mixes: on the right numbers, from our seeds, and with labels a loss understands."""

from __future__ import annotations

import builtins
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sparsify_deploy.errors import DataError, EnvironmentProblem, Interrupted, MissingExtra
from sparsify_deploy.preprocessing.spec import ArrayInput, ArraySpec, ImageSpec
from sparsify_deploy.tasks import classification
from sparsify_deploy.training import vision
from sparsify_deploy.training.augment import augmented
from sparsify_deploy.training.batches import Batches
from sparsify_deploy.training.distillation import Distiller
from sparsify_deploy.training.image_settings import Augment
from sparsify_deploy.training.settings import Distillation
from sparsify_deploy.training.updater import Dense
from sparsify_deploy.training.vision import Mixing, Pixels
from sparsify_deploy.types import Context

pytestmark = pytest.mark.usefixtures("torchvision")

SHIFT, DIVISOR = (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)
PIXELS = Pixels(*(torch.tensor(part).reshape(-1, 1, 1) for part in (SHIFT, DIVISOR)))
EACH = ["rand_augment", "trivial_augment_wide", "random_erasing", "random_resized_crop", "color_jitter"]


def one(name, **params):
    return Augment.model_validate({name: params})


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def pictures(count=6, channels=3, size=16):
    return torch.randint(256, (count, channels, size, size), generator=generator(), dtype=torch.uint8)


def numbers(pixels=PIXELS, **given):
    return pixels.numbers_of(pictures(**given))


def test_bytes_come_back_exactly_from_the_numbers_a_network_takes():
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    assert torch.equal(PIXELS.bytes_of(PIXELS.numbers_of(every)), every)
    assert torch.equal(PIXELS.numbers_of(PIXELS.bytes_of(PIXELS.numbers_of(every))), PIXELS.numbers_of(every))


@pytest.mark.parametrize(
    ("spec", "known"),
    [
        (ImageSpec("RGB", 16, "stretch", SHIFT, DIVISOR), True),
        (ImageSpec("RGB", 16, "stretch", SHIFT, DIVISOR, input="picture"), False),
        (ArraySpec((ArrayInput("input", "uint8", (3, 16, 16), "CHW", SHIFT, DIVISOR),)), True),
        (ArraySpec((ArrayInput("input", "uint8", (3, 16, 16), "CHW"),)), True),
        (ArraySpec((ArrayInput("input", "float32", (3, 16, 16), "CHW", SHIFT, DIVISOR),)), False),
        (None, False),
    ],
)
def test_only_images_that_were_bytes_are_taken_for_bytes(spec, known):
    pixels = Pixels.of(SimpleNamespace(preprocessing=spec))
    assert (pixels is not None) == known
    if pixels is not None:
        bare = getattr(spec, "inputs", None) and not spec.inputs[0].shift
        images = pictures().float() if bare else numbers()
        assert torch.equal(pixels.bytes_of(images), pictures())


def test_a_data_set_without_a_word_on_preprocessing_has_no_bytes():
    assert Pixels.of(SimpleNamespace()) is None


@pytest.mark.parametrize("name", EACH)
def test_each_change_is_torchvisions_own_from_our_seed(name, torchvision):
    from torchvision.transforms import v2

    theirs = {
        "rand_augment": v2.RandAugment(),
        "trivial_augment_wide": v2.TrivialAugmentWide(),
        "random_erasing": v2.RandomErasing(),
        "random_resized_crop": v2.RandomResizedCrop((16, 16)),
        "color_jitter": v2.ColorJitter(0.4, 0.4, 0.4, 0.0),
    }[name]
    images = numbers()
    before = torch.get_rng_state()
    made = augmented({"input": images}, [one(name)], generator(), PIXELS)["input"]
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator())))
        if name in ("random_erasing", "random_resized_crop"):
            expected = torch.stack([theirs(image) for image in images])
        else:
            expected = PIXELS.numbers_of(torch.stack([theirs(image) for image in pictures()]))
    assert torch.equal(made, expected)
    assert not torch.equal(made, images)
    assert torch.equal(made, augmented({"input": images}, [one(name)], generator(), PIXELS)["input"])
    assert not torch.equal(made, augmented({"input": images}, [one(name)], generator(2), PIXELS)["input"])
    assert torch.equal(images, numbers())


def test_every_image_gets_draws_of_its_own():
    same = numbers()[:1].expand(8, -1, -1, -1)
    for name in EACH:
        made = augmented({"input": same}, [one(name)], generator(), PIXELS)["input"]
        assert len({tuple(image.flatten().tolist()) for image in made}) > 2, name


def test_parameters_reach_torchvision():
    images = numbers(count=64)

    def share(**params):
        made = augmented({"input": images}, [one("random_erasing", **params)], generator())["input"]
        return (made != images).flatten(1).any(1).float().mean().item()

    assert share(probability=1.0) == 1.0
    assert 0.1 < share(probability=0.3) < 0.5
    assert torch.equal(
        augmented(
            {"input": images}, [one("color_jitter", brightness=0, contrast=0, saturation=0)], generator(), PIXELS
        )["input"],
        images,
    )
    weak, strong = (
        augmented({"input": images}, [one("rand_augment", num_ops=1, magnitude=m)], generator(), PIXELS)["input"]
        for m in (0, 30)
    )
    assert (weak - images).abs().mean() < (strong - images).abs().mean()
    whole = one("random_resized_crop", scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert torch.allclose(augmented({"input": images}, [whole], generator())["input"], images)


def test_the_order_of_the_list_is_the_order_of_the_changes():
    changes = [one("random_erasing", probability=1.0), one("random_resized_crop", scale=(0.2, 0.3))]
    first, second = (augmented({"input": numbers()}, order, generator())["input"] for order in (changes, changes[::-1]))
    assert not torch.equal(first, second)
    # erased last, some rectangle is exactly 0 in each image
    assert (second == 0).flatten(1).any(1).all()


@pytest.mark.parametrize("name", ["rand_augment", "trivial_augment_wide", "color_jitter"])
def test_what_works_on_bytes_says_so_where_there_are_none(name):
    with pytest.raises(DataError, match=f"^data.augment {name} works on bytes, and this data set"):
        augmented({"input": numbers()}, [one(name)], generator(), None)
    four = Pixels(torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
    with pytest.raises(DataError, match=f"^data.augment {name} works on 1 or 3 channels, these images have 4"):
        augmented({"input": pictures(channels=4).float()}, [one(name)], generator(), four)
    grey = augmented({"input": pictures(channels=1).float()}, [one(name)], generator(), four)["input"]
    assert grey.shape == (6, 1, 16, 16)
    with pytest.raises(DataError, match=f"data.augment {name} needs a field 'input' of shape"):
        augmented({"input": torch.zeros(3, 5)}, [one(name)], generator(), PIXELS)


def test_without_torchvision_the_line_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *given, **more):
        if name.startswith("torchvision"):
            raise ModuleNotFoundError("No module named 'torchvision'")
        return real(name, *given, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=r"pip install 'sparsify-deploy\[vision\]'"):
        vision.transforms()

    def broken(name, *given, **more):
        if name.startswith("torchvision"):
            raise RuntimeError("operator torchvision::nms does not exist")
        return real(name, *given, **more)

    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(EnvironmentProblem, match=r"does not load: operator torchvision::nms.*from one index"):
        vision.transforms()


# -- mixing --------------------------------------------------------------------------------------------------------


def batch(count=8, classes=4):
    images = numbers(count=count)
    return {"input": images, "target": torch.arange(count) % classes, "other": torch.arange(count)}


def test_mixup_mixes_images_and_labels_by_one_share():
    given = batch()
    mixed = Mixing(0.8, None, 4)(given, generator())
    assert torch.equal(mixed["target"], given["target"])
    assert torch.equal(mixed["other"], given["other"])
    soft = mixed["soft_target"]
    assert torch.allclose(soft.sum(1), torch.ones(8))
    share = soft[0, 0].item()
    assert 0.0 < share < 1.0
    expected = share * given["input"] + (1 - share) * given["input"].roll(1, 0)
    assert torch.allclose(mixed["input"], expected, atol=1e-5)
    assert torch.allclose(
        soft, share * F.one_hot(given["target"], 4) + (1 - share) * F.one_hot(given["target"], 4).roll(1, 0)
    )
    assert torch.equal(given["input"], numbers(count=8))


def test_cutmix_shares_labels_by_area():
    given = batch()
    shares = set()
    for seed in range(12):
        mixed = Mixing(None, 1.0, 4)(given, generator(seed))
        pasted = (mixed["input"] != given["input"]).any(1)
        rolled = given["input"].roll(1, 0)
        assert torch.equal(mixed["input"], torch.where(pasted[:, None], rolled, given["input"]))
        area = pasted[0].float().mean().item()
        assert mixed["soft_target"][0, 0].item() == pytest.approx(1 - area, abs=0.02)
        shares.add(round(area, 3))
    assert len(shares) > 6


def test_with_both_each_batch_gets_one_of_them():
    given = batch()
    kinds = []
    for seed in range(30):
        mixed = Mixing(1.0, 1.0, 4)(given, generator(seed))["input"]
        own, rolled = mixed == given["input"], mixed == given["input"].roll(1, 0)
        kinds.append(bool((own | rolled).all()))
    assert 5 < sum(kinds) < 25


def test_mixing_depends_on_seed_and_number_alone(tiny):
    split = tiny.split(input=numbers(count=37), target=torch.arange(37) % 4)
    made = [Batches(split, seed=4, batch_size=8, mixing=Mixing(0.5, 0.5, 4), augment=["flip"]) for _ in range(2)]
    forward = [made[0].batch(k) for k in range(9)]
    torch.manual_seed(99)
    backward = [made[1].batch(k) for k in reversed(range(9))][::-1]
    for one_, other in zip(forward, backward, strict=True):
        assert all(torch.equal(one_[name], other[name]) for name in one_)
    alone = Batches(split, seed=4, batch_size=8, mixing=Mixing(0.5, None, 4))
    shares = {round(alone.batch(k)["soft_target"].max(1).values.min().item(), 4) for k in range(9)}
    assert len(shares) > 6


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"input": torch.zeros(8, 5)}, r"field 'input' of shape \(N, C, H, W\), which has shape \(8, 5\)"),
        ({"target": torch.zeros(8)}, "one integer label an example"),
        ({"target": torch.zeros(8, 2, dtype=torch.int64)}, "one integer label an example"),
        ({"target": torch.arange(8)}, "label 7 is not one of the model's 4 classes"),
    ],
)
def test_what_cannot_be_mixed_is_one_line(changes, says):
    with pytest.raises(DataError, match=says):
        Mixing(0.5, None, 4)({**batch(), **changes}, generator())
    with pytest.raises(DataError, match="is missing"):
        Mixing(0.5, None, 4)({"text": torch.zeros(8, 5), "target": torch.zeros(8, dtype=torch.int64)}, generator())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_mixed_labels_is_the_mixed_loss(smoothing):
    task = classification.create(classification.Params(label_smoothing=smoothing))
    mixed = Mixing(0.8, None, 4)(batch(), generator())
    logits = torch.randn(8, 4, generator=generator(), requires_grad=True)
    loss = task.loss({"output": logits}, mixed)
    share = mixed["soft_target"][0, 0].item()
    both = [
        F.cross_entropy(logits, t, label_smoothing=smoothing) for t in (mixed["target"], mixed["target"].roll(1, 0))
    ]
    assert loss.item() == pytest.approx((share * both[0] + (1 - share) * both[1]).item(), rel=1e-5)
    hard = {name: value for name, value in mixed.items() if name != "soft_target"}
    assert task.loss({"output": logits}, hard).item() == pytest.approx(both[0].item(), rel=1e-6)
    assert math.isfinite(task.loss({"output": logits.bfloat16()}, mixed).item())
    plain = {name: value.numpy() for name, value in mixed.items()}
    found = task.evaluate({"output": logits.detach().numpy()}, plain)
    assert found["accuracy"] == np.mean(logits.detach().numpy().argmax(1) == plain["target"])


def test_a_teacher_sees_the_mixed_images_and_its_logits_are_still_logits(tiny):
    seen = []
    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 4))
    teacher.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    settings = Distillation(weight=1.0)
    distiller = Distiller(teacher, settings, inputs=("input",), output=None, names=(), theirs={}, own={})
    mixed = Mixing(0.8, None, 4)(batch(), generator())
    logits = torch.randn(8, 4, generator=generator())
    found = distiller.loss(torch.tensor(0.0), {"output": logits}, mixed)
    assert torch.equal(seen[0], mixed["input"])
    with torch.no_grad():
        theirs = teacher(mixed["input"])
    t = settings.temperature
    expected = t**2 * F.kl_div((logits / t).log_softmax(1), (theirs / t).softmax(1), reduction="batchmean")
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("kill", [1, 5, 10])
def test_resuming_with_all_of_them_is_bit_exact(tiny, tmp_path, kill):
    def run(folder, stop_after=0):
        calls = iter(range(1, 99))
        trainer = tiny.trainer(
            tmp_path / folder,
            tiny.settings(),
            augment=("crop", *(one(name) for name in EACH)),
            pixels=Pixels(torch.full((1, 1, 1), 128.0), torch.full((1, 1, 1), 40.0)),
            mixing=Mixing(0.4, 1.0, 4),
            context=Context(stop_requested=lambda: next(calls) == stop_after, checkpoint_every_s=1e9),
        )
        trainer.fit(Dense())
        return tiny.state(trainer), trainer.history.losses

    whole = run("whole")
    with pytest.raises(Interrupted):
        run("cut", kill)
    torch.manual_seed(kill)
    again = run("cut")
    assert tiny.differing(whole[0], again[0]) == []
    assert whole[1] == again[1]


def test_nothing_is_imported_where_nothing_is_asked_for(tiny, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    tiny.trainer(tmp_path, tiny.settings(steps=2), augment=("crop", "flip")).fit(Dense())
    assert not any(name.partition(".")[0] == "torchvision" for name in sys.modules)
