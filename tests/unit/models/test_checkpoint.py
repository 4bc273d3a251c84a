"""Checkpoints: both formats, wrappings, and one line for each way not to fit."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sparsify_deploy.errors import ModelError
from sparsify_deploy.models._checkpoint import load_checkpoint


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def save(value: object, path: Path) -> Path:
    with path.open("wb") as out:
        torch.save(value, out)
    return path


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def failure(model: nn.Module, path: Path) -> str:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ModelError) as caught:
        load_checkpoint(model, path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def test_safetensors_and_torch_files_load(tmp_path: Path) -> None:
    source = net()
    source(torch.randn(2, 3, 3, 3))  # moves the running statistics
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    state = source.state_dict()
    files = [
        tmp_path / "w.safetensors",
        save(state, tmp_path / "a.pt"),
        save({"state_dict": state, "epoch": 3}, tmp_path / "b.pth"),
        save({"model": state}, tmp_path / "c.pt"),
        save({"model_state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "d.pt"),
        save({f"module.{k}": v for k, v in state.items()}, tmp_path / "e.bin"),
        save({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, tmp_path / "f.pt"),
    ]
    for path in files[:-1]:
        model = net()
        assert not same(model, source)
        load_checkpoint(model, path)
        assert same(model, source), path
    load_checkpoint(net(), files[-1])


def test_a_prefix_that_is_the_models_own_stays(tmp_path: Path) -> None:
    model = nn.Module()
    model.module = nn.Linear(2, 2)
    state = {k: v + 1 for k, v in model.state_dict().items()}
    load_checkpoint(model, save(state, tmp_path / "w.pt"))
    assert torch.equal(model.module.weight, state["module.weight"])


def test_a_shared_tensor_may_be_given_once(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    state = {"0.weight": torch.full((2, 2), 5.0), "0.bias": torch.ones(2), "1.bias": torch.ones(2)}
    save_file(state, tmp_path / "w.safetensors")
    load_checkpoint(model, tmp_path / "w.safetensors")
    assert torch.equal(model[1].weight, state["0.weight"])


def test_keys_that_do_not_fit_are_counted_and_named(tmp_path: Path) -> None:
    state = net().state_dict()
    state["3.wieght"] = state.pop("3.weight")
    del state["3.bias"]
    state["0.weight"] = torch.zeros(4, 3, 5, 5)
    assert failure(net(), save(state, tmp_path / "w.pt")) == (
        "does not fit the model: 2 missing (3.weight, 3.bias); 1 unexpected (3.wieght), did you mean '3.weight' by "
        "'3.wieght'?; 1 of another shape (0.weight (4, 3, 5, 5), the model has (4, 3, 3, 3)); "
        "model.checkpoint_partial: true loads what fits and leaves the rest as initialised"
    )
    many = {f"k{i}": torch.zeros(1) for i in range(9)} | net().state_dict()
    assert "9 unexpected (k0, k1, k2, ...)" in failure(net(), save(many, tmp_path / "many.pt"))
    assert "missing" in failure(net(), save({}, tmp_path / "none.pt"))


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    state = net().state_dict()
    state["3.bias"][0] = torch.nan
    assert failure(net(), save(state, tmp_path / "w.pt")).startswith("1 with NaN or infinity (3.bias)")


def test_a_pickle_of_objects_is_refused_with_advice(tmp_path: Path) -> None:
    for index, value in enumerate([net(), {"a": os.path.join}, {"state_dict": net().state_dict(), "f": Path("x")}]):
        message = failure(net(), save(value, tmp_path / f"{index}.pt"))
        assert message.startswith("holds Python objects besides tensors")
        assert "safetensors.torch.save_file" in message


def test_a_pickle_never_runs(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    assert "could run code" in failure(net(), save({"w": Evil()}, tmp_path / "w.pt"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"junk" * 50, b"hello world\n", b"PK\x03\x04" + b"x" * 90, bytes(200)])
def test_junk_is_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    assert "damaged or cut short" in failure(net(), path)


@pytest.mark.parametrize("kept", [0.2, 0.6, 0.95])
def test_cut_short_files_are_refused(tmp_path: Path, kept: float) -> None:
    state = net().state_dict()
    buffers = {}
    for new in (True, False):
        buffer = io.BytesIO()
        torch.save(state, buffer, _use_new_zipfile_serialization=new)
        buffers[f"{new}.pt"] = buffer.getvalue()
    save_file(state, tmp_path / "whole.safetensors")
    buffers["w.safetensors"] = (tmp_path / "whole.safetensors").read_bytes()
    for name, content in buffers.items():
        path = tmp_path / name
        path.write_bytes(content[: int(len(content) * kept)])
        assert "damaged or cut short" in failure(net(), path)


def test_what_is_no_state_dict_is_named(tmp_path: Path) -> None:
    assert failure(net(), save([1, 2], tmp_path / "w.pt")).startswith("holds list, expected a mapping")
    assert failure(net(), save({"epoch": 3}, tmp_path / "v.pt")).startswith("'epoch' is int, expected names")


def test_files_that_are_none(tmp_path: Path) -> None:
    assert failure(net(), tmp_path / "absent.pt") == "no such file"
    assert failure(net(), tmp_path) == "is a folder, expected a file"
    (tmp_path / "w.h5").write_bytes(b"x")
    assert "expected .safetensors, .pt or .pth" in failure(net(), tmp_path / "w.h5")
