"""Every training method and criterion on a GPU: it runs, its mask holds, and the same run gives the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file  # noqa: E402

from sparsify_deploy import workspace  # noqa: E402
from sparsify_deploy.sparsity.mask import Mask  # noqa: E402
from sparsify_deploy.sparsity.nm import is_nm  # noqa: E402
from sparsify_deploy.types import Silent  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]

DEVICE = "cuda"
BASE = """\
version: 1
seed: 1
dense_branch: false
model: {source: builtin, params: {name: resnet8, width: 16, in_channels: 1}}
data: {source: digits}
training: {steps: 8, batch_size: 32, accumulate: 2, optimizer: {lr: 0.02}}
"""
RANDOM = "sparsity: 0.7\ninit: {criterion: random, allocation: erk}\n"
METHODS = {
    "static": RANDOM,
    "rigl": RANDOM,
    "set": RANDOM,
    "snfs": RANDOM,
    "ste": "sparsity: 0.7\n",
    "sr_ste": "",
    "gradual": "sparsity: 0.7\n",
    "imp": "sparsity: 0.36\n",
}
MOVING = {"rigl", "set", "snfs", "gradual"}


def trained(folder: Path, text: str, step: str) -> Path:
    """The folder of one finished step of a recipe trained on the GPU."""
    recipe = folder / "recipe.yaml"
    folder.mkdir()
    recipe.write_text(BASE + text, encoding="utf-8")
    run = workspace.open_run(recipe, (), folder / "run", None, trust_code=False)
    run.run(Silent(), device=DEVICE, checkpoint_every_s=30.0, until=step)
    (found,) = [s for s in run.status(step) if s.step.id == f"sparse/{step}"]
    assert found.record is not None
    return found.record.outputs["weights"].parent


def check_pair(first: Path, second: Path) -> dict[str, torch.Tensor]:
    """Two runs agree to the byte, and pruned weights are zero; the weights."""
    weights, mask = load_file(first / "weights.safetensors"), Mask.load(first / "mask.safetensors")
    assert (first / "weights.safetensors").read_bytes() == (second / "weights.safetensors").read_bytes()
    assert all(bool((weights[name][~kept] == 0).all()) for name, kept in mask.items())
    assert mask.density < 1
    return weights


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("method", METHODS)
def test_a_method(tmp_path: Path, method: str, precision: str) -> None:
    params = "{update_every: 2}" if method in MOVING else "{}"
    train = f"{{method: {method}, params: {params}, training: {{precision: {precision}}}}}"
    text = f"{METHODS[method]}train: {train}\n"
    check_pair(*(trained(tmp_path / name, text, "train") for name in ("a", "b")))


@pytest.mark.parametrize("criterion", ["snip", "grasp", "synflow", "magnitude", "random"])
def test_a_criterion(tmp_path: Path, criterion: str) -> None:
    text = f"sparsity: 0.7\ninit: {{criterion: {criterion}}}\ntrain: {{method: static}}\n"
    check_pair(*(trained(tmp_path / name, text, "train") for name in ("a", "b")))


def test_permuting_projecting_and_fine_tuning(tmp_path: Path) -> None:
    text = "nm: {via: ['4:8'], permute: channel_swap, fill_batches: 2, fine_tune: {steps: 6}}\ndistillation: "
    text += "{phases: [fine_tune]}\n"
    weights = check_pair(*(trained(tmp_path / name, text, "project_nm") for name in ("a", "b")))
    assert is_nm(weights["layer2.0.conv2.weight"], 2, 4)
