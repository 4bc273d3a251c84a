"""Names of engine layers into ONNX nodes, and the builder's lists of such names."""

from __future__ import annotations

import pytest

from sparsify_deploy.graph.engine_names import hides_nodes, listed, nodes_in


@pytest.mark.parametrize(
    ("name", "metadata", "nodes"),
    [
        ("conv1", "", ("conv1",)),
        (
            "conv1.weight + /q/QuantizeLinear + conv1 + /relu",
            "",
            ("conv1.weight", "/q/QuantizeLinear", "conv1", "/relu"),
        ),
        ("/conv1/Conv || /conv2/Conv", "", ("/conv1/Conv", "/conv2/Conv")),
        ("PWN(/relu/Relu)", "", ("/relu/Relu",)),
        ("PWN(PWN(Sigmoid_2), Mul_3)", "", ("Sigmoid_2", "Mul_3")),
        ("Conv_0 + PWN(PWN(Relu_1))", "", ("Conv_0", "Relu_1")),
        ("conv (1) + PWN(add (2))", "", ("conv (1)", "add (2)")),
        ("[Conv] /layer1/conv", "", ("/layer1/conv",)),
        ("Conv_4_clone_1", "", ("Conv_4",)),
        ("conv + conv", "", ("conv",)),
        ("{ForeignNode[/a/MatMul.../b/Add]}", "", ()),
        ("{ForeignNode[/a/MatMul.../b/Add]}", "[ONNX Layer: /a/MatMul]", ("/a/MatMul",)),
        ("Reformatting CopyNode for Input Tensor 0 to Conv_0", "", ()),
        ("(Unnamed Layer* 12) [Constant]", "", ()),
        ("__myl_FcAdd_myl0_3", "", ()),
        ("__myl_FcAdd_myl0_3", "[ONNX Layer: fc1]\x1e[ONNX Layer: add (1)]\x1f[ONNX Layer: fc1]", ("fc1", "add (1)")),
        ("conv1 + relu", "[ONNX Layer: conv1][ONNX Layer: relu]", ("conv1", "relu")),
    ],
)
def test_the_onnx_nodes_in_a_layer(name: str, metadata: str, nodes: tuple[str, ...]) -> None:
    assert nodes_in(name, metadata) == nodes


def test_compiled_parts_hide_their_nodes() -> None:
    assert hides_nodes("{ForeignNode[a...b]}")
    assert hides_nodes("__myl_Fc_0x1f")
    assert not hides_nodes("conv1 + relu")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (" conv1 + relu1, fc", ["conv1 + relu1", "fc"]),
        ("conv + PWN(PWN(a), b), fc", ["conv + PWN(PWN(a), b)", "fc"]),
        ("a, {ForeignNode[b, c]}\n", ["a", "{ForeignNode[b, c]}"]),
        ("odd) , b", ["odd)", "b"]),
        (" ", []),
        ("", []),
    ],
)
def test_a_list_of_the_builders_log(text: str, names: list[str]) -> None:
    assert [*listed(text)] == names
