"""Export with axes whose size differs between batches: which outputs follow, and what the file says of them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from sparsify_deploy.errors import DataError, ModelError
from sparsify_deploy.export.axes import FreeAxes, free_axes, sized, sizes_of
from sparsify_deploy.export.onnx import export
from sparsify_deploy.export.parity import Parity, together
from sparsify_deploy.graph import axis_sizes, file
from sparsify_deploy.types import AxisSizes

onnxruntime = pytest.importorskip("onnxruntime")
FREE = FreeAxes({"ids": {1: "length"}, "mask": {1: "length"}}, {"length": AxisSizes(2, 7, 12)})


class Tokens(nn.Module):
    """Attention over tokens; a class, a value a token, one an edge between two, and the padded tokens' number."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(20, 8), nn.Embedding(12, 8)
        self.query, self.key, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        scores = self.query(x) @ self.key(x).transpose(1, 2) + (1.0 - mask[:, None].float()) * -1e4
        x = torch.softmax(scores, -1) @ x
        return {"class": self.head(x.mean(1)), "each": self.head(x), "edges": scores, "twice": torch.cat([x, x], 1)}


def batch(count: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length)
    mask = torch.ones(count, length, dtype=torch.int64)
    mask[0, length // 2 + 1 :] = 0
    return {"ids": torch.randint(0, 20, (count, length), generator=generator), "mask": mask}


def shapes(path) -> dict[str, list[str | int]]:
    graph = onnx.load(path).graph
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }


@pytest.fixture(scope="module")
def net() -> Tokens:
    torch.manual_seed(0)
    return Tokens().eval()


@pytest.mark.parametrize("example", [batch(1, 7), batch(3, 5)])
def test_outputs_follow_the_axes_of_the_inputs(net, tmp_path, example) -> None:
    path = tmp_path / "net.onnx"
    export(net, example, ["ids", "mask"], path, free=FREE)
    assert shapes(path) == {
        "ids": ["batch", "length"],
        "mask": ["batch", "length"],
        "class": ["batch", 3],
        "each": ["batch", "length", 3],
        "edges": ["batch", "length", "length"],
        "twice": ["batch", "twice_1", 8],
    }
    assert {each.dtype for each in file.inputs(file.load(path))} == {"int64"}
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for count, length in ((1, 2), (4, 7), (2, 12)):
        given = batch(count, length)
        with torch.no_grad():
            expected = net(**given)
        found = session.run(list(expected), {name: value.numpy() for name, value in given.items()})
        for name, values in zip(expected, found, strict=True):
            np.testing.assert_allclose(values, expected[name].numpy(), atol=2e-5, err_msg=f"{name} at {length}")


def test_the_batch_may_stay_fixed(net, tmp_path) -> None:
    path = tmp_path / "net.onnx"
    export(net, batch(2, 7), ["ids", "mask"], path, free=FREE, dynamic_batch=False)
    assert shapes(path)["ids"] == [2, "length"]
    assert shapes(path)["class"] == [2, 3]
    assert shapes(path)["each"] == [2, "length", 3]


def test_the_file_says_which_sizes_its_axes_take(net, tmp_path) -> None:
    path = tmp_path / "net.onnx"
    export(net, batch(1, 7), ["ids", "mask"], path, free=FREE)
    model = file.load(path)
    assert axis_sizes.axis_sizes(model) == {"length": AxisSizes(2, 7, 12)}
    assert axis_sizes.plain(model) == {"ids": {"1": [2, 7, 12]}, "mask": {"1": [2, 7, 12]}}
    axis_sizes.set_axis_sizes_(model, {"length": AxisSizes(1, 3, 9)})
    assert axis_sizes.axis_sizes(model) == {"length": AxisSizes(1, 3, 9)}
    for damaged in ("7", "0 1 2", "3 2 1", "1 2 3 4", "a b c"):
        model.metadata_props[-1].value = damaged
        assert axis_sizes.axis_sizes(model) == {}


def test_a_file_with_fixed_axes_says_nothing(net, tmp_path) -> None:
    path = tmp_path / "net.onnx"
    export(net, batch(1, 7), ["ids", "mask"], path)
    assert shapes(path)["ids"] == ["batch", 7]
    assert not onnx.load(path).metadata_props


def test_without_known_sizes_the_axis_is_free_all_the_same(net, tmp_path) -> None:
    path = tmp_path / "net.onnx"
    export(net, batch(1, 5), ["ids", "mask"], path, free=FreeAxes(FREE.axes))
    assert shapes(path)["each"] == ["batch", "length", 3]
    assert axis_sizes.plain(file.load(path)) == {}


def test_predictions_of_the_file_and_of_the_network_agree_at_the_typical_length(net, tmp_path) -> None:
    from sparsify_deploy.graph.shapes import workloads
    from sparsify_deploy.stages.workloads import network_workloads

    path = tmp_path / "net.onnx"
    export(net, batch(4, 9), ["ids", "mask"], path, free=FREE)  # neither the typical length nor one example
    by_file = {work.parameter: work for work in workloads(file.load(path)) if work.parameter}
    by_torch = {work.parameter: work for work in network_workloads(net, batch(1, 7), ["ids", "mask"]) if work.parameter}
    assert by_file.keys() == by_torch.keys()
    assert by_file["query.weight"].macs == 7 * 8 * 8
    for name, work in by_torch.items():
        assert (by_file[name].macs, by_file[name].written) == (work.macs, work.written), name
    attention = [work for work in workloads(file.load(path)) if work.op == "Attention"]
    assert [work.macs for work in attention] == [2 * 7 * 7 * 8]


def test_an_unknown_size_cannot_be_predicted(net, tmp_path) -> None:
    from sparsify_deploy.graph.shapes import workloads

    path = tmp_path / "net.onnx"
    export(net, batch(1, 5), ["ids", "mask"], path, free=FreeAxes(FREE.axes))
    with pytest.raises(ModelError, match="input 'ids' leaves axis 1 open"):
        workloads(file.load(path))


def test_batches_of_a_given_size_are_cut_or_filled_up_from_their_start() -> None:
    given = {"ids": torch.tensor([[1, 2, 3]]), "mask": torch.ones(1, 3), "target": torch.tensor([5])}
    longer = sized(given, FREE, {"length": 5})
    assert longer["ids"].tolist() == [[1, 2, 3, 1, 2]]
    assert longer["mask"].shape == (1, 5)
    assert longer["target"] is given["target"]
    assert sized(given, FREE, {"length": 2})["ids"].tolist() == [[1, 2]]
    assert sized(given, FREE, {})["ids"] is given["ids"]
    assert sizes_of(longer, FREE) == {"length": 5}


class Data:
    inputs = ("ids",)

    def __init__(self, axes: object, sizes: object) -> None:
        self.dynamic_axes, self.axis_sizes = axes, sizes


@pytest.mark.parametrize(
    ("axes", "sizes", "message"),
    [
        ({"ids": {0: "n"}}, {}, "calls axis 0 of 'ids' 'n'"),
        ({"ids": {1: "batch"}}, {}, "a word other than 'batch'"),
        ({"ids": {1: "two words"}}, {}, "'two words'"),
        ({"ids": {1: "n"}}, {"m": AxisSizes(1, 2, 3)}, "axis_sizes names 'm', which dynamic_axes does not"),
        ({"ids": {1: "n"}}, {"n": AxisSizes(3, 2, 3)}, "expected 1 <= least <= typical <= largest"),
        ({"ids": {1: "n"}}, {"n": AxisSizes(0, 2, 3)}, "expected 1 <= least"),
    ],
)
def test_what_a_data_set_cannot_mean(axes, sizes, message) -> None:
    with pytest.raises(DataError, match=message) as caught:
        free_axes(Data(axes, sizes))
    assert "\n" not in str(caught.value)


def test_a_data_set_need_not_say_anything() -> None:
    assert not free_axes(object())
    assert free_axes(Data({"ids": {1: "n"}}, {})).names == ("n",)


def test_fields_that_share_a_name_have_one_size() -> None:
    with pytest.raises(DataError, match="'length' has size 3 in one field and 4 in 'mask'"):
        sizes_of({"ids": torch.ones(1, 3), "mask": torch.ones(1, 4)}, FREE)
    with pytest.raises(DataError, match="names 'mask', and the fields are ids"):
        sizes_of({"ids": torch.ones(1, 3)}, FREE)
    with pytest.raises(DataError, match="axis 1 of 'ids', which has 1 axes"):
        sizes_of({"ids": torch.ones(1), "mask": torch.ones(1, 4)}, FREE)


def test_comparisons_are_weighted_by_their_examples() -> None:
    found = together([Parity(1.0, 0.5, 1.0, 3), Parity(2.0, 0.1, 0.0, 1), Parity(0.0, 0.0, None, 4)])
    assert found == Parity(2.0, 0.5, 0.75, 8)
    with pytest.raises(ModelError, match="no output to compare"):
        together([])
