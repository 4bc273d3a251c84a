from __future__ import annotations

import pytest
import torch

from sparsify_deploy.errors import DataError
from sparsify_deploy.training import augment
from sparsify_deploy.training.batches import Batches, derived_seed
from sparsify_deploy.training.loop import training_batches


def test_batch_k_depends_on_the_seed_and_k_alone(tiny):
    forward = Batches(tiny.images(), seed=4, batch_size=8, augment=("crop", "flip"))
    backward = Batches(tiny.images(), seed=4, batch_size=8, augment=("crop", "flip"))
    ahead = [forward.batch(k) for k in range(12)]
    torch.manual_seed(999)
    for k in reversed(range(12)):
        for name, value in backward.batch(k).items():
            assert torch.equal(value, ahead[k][name])


def test_an_epoch_is_a_permutation_without_the_incomplete_batch(tiny):
    batches = Batches(tiny.images(37), seed=4, batch_size=8)
    assert batches.per_epoch == 4
    first = torch.cat([batches.indices(k) for k in range(4)])
    second = torch.cat([batches.indices(k) for k in range(4, 8)])
    assert len(set(first.tolist())) == 32
    assert len(set(second.tolist())) == 32
    assert first.tolist() != second.tolist()


def test_other_seeds_give_other_batches(tiny):
    one, other = (Batches(tiny.images(), seed=seed, batch_size=8).indices(0) for seed in (0, 1))
    assert one.tolist() != other.tolist()


def test_fewer_examples_than_a_batch_are_one_batch(tiny):
    batches = Batches(tiny.images(5), seed=0, batch_size=8)
    assert batches.per_epoch == 1
    assert sorted(batches.indices(3).tolist()) == [0, 1, 2, 3, 4]


def test_no_examples_is_a_data_error(tiny):
    with pytest.raises(DataError, match="no examples"):
        Batches(tiny.split(input=torch.zeros(0, 1)), seed=0, batch_size=8)


def test_training_batches_are_the_first_of_the_run(tiny):
    batches = Batches(tiny.images(), seed=4, batch_size=8)
    for k, batch in enumerate(training_batches(tiny.images(), seed=4, batch_size=8, count=6)):
        assert torch.equal(batch["input"], batches.batch(k)["input"])


def test_derived_seeds_differ_by_every_argument():
    seeds = {derived_seed(p, s, i) for p in ("step", "epoch") for s in range(20) for i in range(20)}
    assert len(seeds) == 800
    assert all(0 <= seed < 2**63 for seed in seeds)


def _generator():
    return torch.Generator().manual_seed(1)


def test_crop_shifts_by_at_most_an_eighth_and_pads_with_zeros():
    images = torch.arange(1.0, 1 + 200 * 2 * 16 * 24).view(200, 2, 16, 24)
    cropped = augment.crop(images, _generator())
    padded = torch.zeros(200, 2, 20, 30)
    padded[:, :, 2:18, 3:27] = images
    offsets = set()
    for image, wide in zip(cropped, padded, strict=True):
        found = [(y, x) for y in range(5) for x in range(7) if torch.equal(image, wide[:, y : y + 16, x : x + 24])]
        assert len(found) == 1
        offsets.add(found[0])
    assert {y for y, _ in offsets} == set(range(5))
    assert {x for _, x in offsets} == set(range(7))


def test_flip_mirrors_about_half_of_the_images():
    images = torch.randn(400, 2, 4, 4)
    flipped = augment.flip(images, _generator())
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(flipped, images, strict=True)]
    untouched = [torch.equal(a, b) for a, b in zip(flipped, images, strict=True)]
    assert all(m != u for m, u in zip(mirrored, untouched, strict=True))
    assert 160 < sum(mirrored) < 240


@pytest.mark.parametrize("name", ["crop", "flip"])
def test_augmentation_depends_on_its_generator_alone(name):
    images = torch.randn(32, 1, 8, 8)
    before = images.clone()
    one = augment.AUGMENTATIONS[name](images, _generator())
    torch.manual_seed(5)
    assert torch.equal(one, augment.AUGMENTATIONS[name](images, _generator()))
    assert not torch.equal(one, augment.AUGMENTATIONS[name](images, torch.Generator().manual_seed(2)))
    assert torch.equal(images, before)


def test_augmenting_what_is_no_image_is_a_data_error():
    with pytest.raises(DataError, match=r"shape \(3, 5\)"):
        augment.augmented({"input": torch.zeros(3, 5)}, ("crop",), _generator())
    with pytest.raises(DataError, match="missing"):
        augment.augmented({"text": torch.zeros(3, 5)}, ("flip",), _generator())
