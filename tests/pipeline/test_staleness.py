"""Nothing stale is reused: contents, versions and packages changed in turn, on a store with every step committed.

Which field of a recipe runs what again is in tests/unit/upper/test_stage_fingerprints.py. Nothing is trained here: what
a step would leave stands in its folder as text.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsify_deploy import menu, pipeline
from sparsify_deploy.artifacts.store import ArtifactStore
from sparsify_deploy.plan import Plan, plan
from sparsify_deploy.recipe_source import load
from sparsify_deploy.stages.quantize import Quantize
from sparsify_deploy.stages.train import Train

RECIPE = """\
version: 1
model: {{source: {model}, params: {params}{checkpoint}}}
data: {{source: {data}, params: {{path: {path}}}}}
training: {{steps: 4}}
sparsity: 0.5
init: {{criterion: random}}
train: {{method: rigl}}
nm: {{fine_tune: {{steps: 2}}}}
quantize: {{qat: {{steps: 2}}}}
deploy: [{{runtime: openvino}}]
"""


@pytest.fixture
def planned(tmp_path: Path) -> Callable[..., Plan]:
    """The plan of a recipe about files of this folder."""
    (tmp_path / "net.py").write_text("from layers import x\n", encoding="utf-8")
    (tmp_path / "layers.py").write_text("x = 1\n", encoding="utf-8")
    (tmp_path / "data.npz").write_bytes(b"data")
    (tmp_path / "start.safetensors").write_bytes(b"weights")
    for name in ("train/a/0.png", "train/b/0.png", "train/b/1.png", "test/a/2.png", "test/b/2.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(name.encode())

    def make(**changes: Any) -> Plan:
        values = {"model": "file", "params": "{path: net.py}", "checkpoint": ", checkpoint: start.safetensors"}
        recipe = RECIPE.format(**{**values, "data": "npz", "path": "data.npz", **changes})
        (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
        return plan(load(tmp_path / "recipe.yaml"))

    return make


def commit_all(found: Plan, folder: Path) -> None:
    """Put a result of every step into the store, from the inputs that the plan wires."""
    store = ArtifactStore(folder)
    prints, records = pipeline.Fingerprints(store.digests), {}
    with store.lock():
        for step in found.steps:
            parts = prints.parts(step, records)
            out = store.begin(step.stage.name, parts)
            for name, file in step.stage.outputs.items():
                (out / file).write_text(f"{step.id} {name}", encoding="utf-8")
            records[step.id] = store.commit(step.stage.name, parts, step.stage.outputs, {}, 1.0)
            store.remember(step.id, parts)


def stale(found: Plan, folder: Path) -> dict[str, str]:
    """The steps that are not taken from the store, with the reason; what follows one is as if its input changed."""
    return {s.step.id: s.why for s in pipeline.survey(found, ArtifactStore(folder)) if s.state != "cached"}


def first(reasons: dict[str, str]) -> dict[str, str]:
    """Those that run for a reason of their own."""
    return {step: why for step, why in reasons.items() if not why.startswith("after ")}


def aged(path: Path) -> None:
    """As if it had lain there for a day, so that no clock is too coarse."""
    old = path.stat().st_mtime_ns - 86_400 * 10**9
    os.utime(path, ns=(old, old))


def same_but_for_a_byte(path: Path) -> None:
    """Another content of the same size, with the times of the file that was there."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


ROOTS = {"sparse/init_mask", "dense/train"}
"""The steps that take no input; all others follow."""


@pytest.mark.parametrize("file", ["data.npz", "start.safetensors", "net.py"])
def test_another_content_of_the_same_size_and_time_runs_everything_again(
    planned: Callable[..., Plan], tmp_path: Path, file: str
) -> None:
    aged(tmp_path / file)
    commit_all(planned(), tmp_path / "store")
    assert stale(planned(), tmp_path / "store") == {}
    same_but_for_a_byte(tmp_path / file)
    found = stale(planned(), tmp_path / "store")
    assert set(found) == {step.id for step in planned().steps}
    assert set(first(found)) == ROOTS
    names = {"data.npz": "data", "start.safetensors": "model", "net.py": "model"}
    assert all(why.startswith(f"files.{names[file]}.") and " -> " in why for why in first(found).values()), found


def test_one_file_of_a_folder_replaced_added_renamed_or_gone_runs_everything_again(
    planned: Callable[..., Plan], tmp_path: Path
) -> None:
    chosen, image = {"data": "folder", "path": "images"}, tmp_path / "images" / "train" / "b" / "1.png"
    aged(image)
    commit_all(planned(**chosen), tmp_path / "store")
    assert stale(planned(**chosen), tmp_path / "store") == {}
    content = image.read_bytes()

    def check() -> None:
        assert set(first(stale(planned(**chosen), tmp_path / "store"))) == ROOTS

    same_but_for_a_byte(image)
    check()
    image.unlink()
    check()
    image.write_bytes(content)
    assert stale(planned(**chosen), tmp_path / "store") == {}
    (image.parent / "2.png").write_bytes(b"new")
    check()
    (image.parent / "2.png").unlink()
    image.rename(image.with_name("3.png"))
    check()
    image.with_name("3.png").rename(tmp_path / "images" / "train" / "a" / "1.png")  # another class
    check()


def test_files_that_moved_with_their_content_run_nothing_again(planned: Callable[..., Plan], tmp_path: Path) -> None:
    commit_all(planned(), tmp_path / "store")
    (tmp_path / "data.npz").rename(tmp_path / "moved.npz")
    assert stale(planned(path="moved.npz"), tmp_path / "store") == {}


def test_a_module_beside_the_users_file_is_not_watched_and_the_documentation_says_so(
    planned: Callable[..., Plan], tmp_path: Path
) -> None:
    commit_all(planned(), tmp_path / "store")
    (tmp_path / "layers.py").write_text("x = 2\n", encoding="utf-8")
    assert stale(planned(), tmp_path / "store") == {}
    for which in ("models", "datasets"):
        assert "nly the file itself enters the fingerprint" in (menu.entry(which, "file").__doc__ or "")


def versions(planned: Callable[..., Plan], tmp_path: Path, change: Callable[[], None]) -> set[str]:
    commit_all(planned(), tmp_path / "store")
    change()
    return set(first(stale(planned(), tmp_path / "store")))


def test_a_package_that_a_stage_depends_on_at_another_version_runs_it_again(
    planned: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pipeline.fact

    def upgrade(name: str) -> Callable[[], None]:
        return lambda: monkeypatch.setattr(pipeline, "fact", lambda n: f"{real(n)}.post1" if n == name else real(n))

    measured = {f"{branch}.report" for branch in ("sparse/project_nm", "dense/fine_tune", "sparse/train")}
    quantized = {"dense/quantize", "sparse/quantize"}
    assert versions(planned, tmp_path, upgrade("modelopt")) == quantized
    assert versions(planned, tmp_path, upgrade("torch")) >= measured
    built = {"dense/build_engine.openvino", "sparse/build_engine.openvino"}
    found = versions(planned, tmp_path, upgrade("openvino"))
    assert built <= found
    assert not {step for step in found if step.endswith(("train", "project_nm", "quantize", "init_mask"))}
    reasons = first(stale(planned(), tmp_path / "store"))
    assert all("environment.openvino: " in reasons[step] for step in built)


def test_a_stage_or_method_of_another_version_runs_again(
    planned: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert versions(planned, tmp_path, lambda: monkeypatch.setattr(Quantize, "version", Quantize.version + 1)) == {
        *("dense/quantize", "sparse/quantize")
    }
    assert versions(planned, tmp_path, lambda: monkeypatch.setattr(Train, "version", Train.version + 1)) == {
        *("dense/train", "sparse/train")
    }
    rigl = menu.entry("methods", "rigl")
    assert versions(planned, tmp_path, lambda: monkeypatch.setattr(rigl, "VERSION", rigl.VERSION + 1)) == {
        "sparse/train"
    }
    assert "methods.methods/rigl: " in stale(planned(), tmp_path / "store")["sparse/train"]
    npz = menu.entry("datasets", "npz")
    assert versions(planned, tmp_path, lambda: monkeypatch.setattr(npz, "VERSION", npz.VERSION + 1)) == ROOTS
