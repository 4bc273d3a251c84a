"""N:M by hand-worked examples; the comparison with brute force is in parity."""

from __future__ import annotations

import pytest
import torch

from sparsify_deploy.errors import ModelError
from sparsify_deploy.sparsity.nm import is_nm, nm_mask, refill, violations


def bits(text: str) -> torch.Tensor:
    return torch.tensor([[c == "1" for c in row] for row in text.split()])


def test_two_of_four_by_hand_ties_to_the_lower_channel() -> None:
    weight = torch.tensor([[1.0, -3.0, 2.0, 0.5, 1.0, 1.0, -1.0, 1.0], [0, 0, 0, 0, 0.0, 0, 5, -6]])
    assert torch.equal(nm_mask(weight, 2, 4), bits("01101100 11000011"))


def test_groups_run_along_the_input_channels_of_a_convolution() -> None:
    # one large weight a channel: at every kernel position channels 1 and 3 must win. Grouping the flattened C·R·S
    # or R·S would choose among the positions of one channel, which are all equal, and keep the lower positions
    weight = torch.tensor([1.0, 4.0, 2.0, 3.0]).view(1, 4, 1, 1).expand(2, 4, 2, 2)
    kept = nm_mask(weight, 2, 4)
    assert kept.shape == weight.shape
    assert kept[:, [1, 3]].all()
    assert not kept[:, [0, 2]].any()
    assert not torch.equal(nm_mask(weight.reshape(2, 16), 2, 4).view(2, 4, 2, 2), kept)
    # all of channel 0 and 1 at each position is 2:4 along C, and breaks it along the flattened kernel
    along_c = torch.zeros(1, 4, 2, 2)
    along_c[:, :2] = 1
    assert is_nm(along_c, 2, 4)
    assert violations(along_c.reshape(1, 16), 2, 4) == 2
    # half of each 2x2 kernel is 2:4 along the flattened kernel, and breaks it along C at two positions
    along_kernel = torch.zeros(1, 4, 2, 2)
    along_kernel[:, :, 0] = 1
    assert violations(along_kernel, 2, 4) == 2
    assert is_nm(along_kernel.reshape(1, 16), 2, 4)


def test_kernel_positions_choose_on_their_own() -> None:
    weight = torch.zeros(1, 8, 1, 2)
    weight[0, :, 0, 0] = torch.tensor([9, 8, 1, 1, 1, 1, 8, 9.0])
    weight[0, :, 0, 1] = torch.tensor([1, 8, 9, 1, 9, 1, 1, 8.0])
    kept = nm_mask(weight, 2, 4)
    assert torch.equal(kept[0, :, 0, :].t(), bits("11000011 01101001"))


def test_with_a_mask_only_its_weights_are_chosen() -> None:
    weight = torch.tensor([[9.0, 1.0, 2.0, 3.0], [9.0, 8.0, 7.0, 6.0], [0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(nm_mask(weight, 2, 4, bits("0111 0001 0011")), bits("0011 0001 0011"))


def test_refill_by_hand() -> None:
    mask = bits("1000 0000 1100 1110")
    gradient = torch.tensor(
        [
            [9.0, 1.0, -3.0, 2.0],  # channel 0 is kept already, -3 is the largest of the others
            [1.0, 1.0, 1.0, 1.0],  # ties: lower channels
            [0.0, 0.0, 9.0, 9.0],  # full: stays
            [0.0, 0.0, 0.0, 9.0],  # more than full: stays
        ]
    )
    assert torch.equal(refill(mask, gradient, 2, 4), bits("1010 1100 1100 1110"))


def test_refill_grows_where_the_gradient_is_zero_too() -> None:
    assert torch.equal(refill(bits("0001"), torch.zeros(1, 4), 2, 4), bits("1001"))


def test_nothing_handed_in_is_changed() -> None:
    weight, gradient = torch.randn(3, 8, 2, 2), torch.randn(3, 8, 2, 2)
    mask = weight > 0
    copies = weight.clone(), gradient.clone(), mask.clone()
    refill(nm_mask(weight, 2, 4, mask), gradient, 2, 4)
    refill(mask, gradient, 2, 4)
    assert all(torch.equal(a, b) for a, b in zip((weight, gradient, mask), copies, strict=True))


@pytest.mark.parametrize("shape", [(8, 6), (8, 3, 3, 3), (8,)])
def test_channels_that_m_does_not_divide_are_an_error(shape: tuple[int, ...]) -> None:
    for call in (lambda t: nm_mask(t, 2, 4), lambda t: violations(t, 2, 4), lambda t: refill(t > 0, t, 2, 4)):
        with pytest.raises(ModelError) as caught:
            call(torch.randn(shape))
        assert str(shape) in str(caught.value)


def test_nan_is_refused() -> None:
    weight = torch.randn(4, 8)
    weight[1, 2] = float("nan")
    with pytest.raises(ModelError, match="NaN"):
        nm_mask(weight, 2, 4)
    with pytest.raises(ModelError, match="NaN"):
        refill(weight > 0, weight, 2, 4)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (2, 17)])
def test_patterns_that_are_none(n: int, m: int) -> None:
    with pytest.raises(ValueError, match="no N:M pattern"):
        nm_mask(torch.ones(1, 68), n, m)
