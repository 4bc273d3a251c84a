"""The matrix products: which shapes, what is checked before it is timed, and the rehearsal's rows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import rigl_update
import torch
from gpu import gemm
from gpu.gemm import Shape, shapes
from gpu.record import load

from sparsify_deploy.errors import RuntimeUnavailable

ROOT = Path(__file__).resolve().parents[3]


def test_the_products_of_resnet50_are_those_of_its_layers() -> None:
    found = shapes(1)["resnet50"]
    real = {(shape[0], shape[1] * shape[2] * shape[3] if len(shape) == 4 else shape[1])
            for name, shape in rigl_update.shapes().items() if name != "conv1"}  # fmt: skip
    assert {(shape.n, shape.k) for shape in found} == real
    assert Shape(3136, 64, 576) in found  # 56 x 56
    assert Shape(64, 512, 4608) in found  # 7 x 7, padded
    assert Shape(3136, 128, 256) in found  # before the stride of the block's 3 x 3
    assert Shape(800, 128, 1152) in found  # after it
    assert Shape(32, 1000, 2048) in found
    assert all(shape.m % 32 == 0 for batch in (1, 8, 32, 256) for each in shapes(batch).values() for shape in each)
    assert {shape.m for shape in shapes(32)["bert"]} == {4096}


def test_operands_rotate_until_they_leave_the_cache() -> None:
    small, large = Shape(32, 64, 64), Shape(8192, 8192, 8192)
    assert gemm.sets_of(small, 2) == 16
    assert gemm.sets_of(large, 2) == 1
    middle = Shape(8192, 4096, 4096)
    assert gemm.sets_of(middle, 1) == 6  # of 48 MiB each
    assert gemm.sets_of(middle, 2) == 3


def test_weights_are_two_of_four() -> None:
    for kind in (gemm.fp16, gemm.int8):
        made = kind(Shape(64, 32, 64), torch.device("cpu"), stand_in=True)
        assert set(made.calls) == {"dense", gemm.CONTROL, gemm.SPARSE}
    weight = gemm._pruned(torch.randn(8, 16))
    assert ((weight.view(8, 4, 4) != 0).sum(2) == 2).all()


def test_a_wrong_product_is_never_timed() -> None:
    x, w = torch.randn(32, 64), torch.randn(48, 64)

    def dense(i: int) -> torch.Tensor:
        return x @ w.t()

    def check(wrong: torch.Tensor) -> gemm.Contestants:
        return gemm._checked(dense, {"sparse": lambda i: wrong}, 1, x, w, limit=5e-3, note="")

    assert check(dense(0)).difference["sparse"] == 0.0
    assert check(dense(0).t()).difference["sparse"] == 0.0  # W X^T is taken as well
    for wrong in (1.1 * dense(0), dense(0).flip(0), torch.full((32, 48), float("nan"))):
        with pytest.raises(RuntimeUnavailable, match="sparse: differs by"):
            check(wrong)
    with pytest.raises(RuntimeUnavailable, match="dense: differs"):
        gemm._checked(lambda i: x @ w.t() + 1, {}, 1, x, w, limit=5e-3, note="")


def test_a_square_product_is_judged_in_either_direction() -> None:
    x = torch.randint(-127, 128, (32, 32), dtype=torch.int8)
    w = torch.randint(-127, 128, (32, 32), dtype=torch.int8)
    reference = x.int() @ w.int().t()
    found = gemm._checked(lambda i: reference, {"sparse": lambda i: reference.t()}, 1, x, w, limit=0.0, note="")
    assert found.difference == {"dense": 0.0, "sparse": 0.0}


def test_the_rehearsal_says_what_it_is_and_can_be_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gemm.json"
    options = ["--out", str(out), "--device", "cpu", "--rehearse", "--rounds", "3"]
    assert gemm.main(options) == 0
    said = capsys.readouterr().out
    assert said.count("rehearsal, ") == 4
    kept = load(out)
    assert kept["fingerprint"]["rehearsal"] is True
    assert len(kept["rows"]) == 4
    for row in kept["rows"].values():
        assert "stand-in" in row["rehearsal"]
        assert set(row["speedup"]) == {gemm.SPARSE}
        assert row["difference"]["sparse"] == 0.0
    assert gemm.main(options) == 0
    assert capsys.readouterr().out == ""


def test_without_a_gpu_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gemm.main(["--out", str(tmp_path / "gemm.json")]) == 3
    assert capsys.readouterr().err.count("\n") == 1


def test_it_needs_torch_and_numpy_and_no_other_package() -> None:
    blocked = ("onnx", "pydantic", "ruamel", "typer", "rich", "safetensors", "jinja2")
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); import gpu.gemm"
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=paths, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
