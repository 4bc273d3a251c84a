"""A whole run leaves its page and its Triton model repositories, and a second one touches neither."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

Result = CompletedProcess[str]


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    files = [folder / "report.html", *(path for path in (folder / "triton").rglob("*") if path.is_file())]
    return {str(p.relative_to(folder)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in files}


def test_a_run_serves_its_engine_and_shows_its_page(cli: Callable[..., Result], finished: Path, tmp_path: Path) -> None:
    from google.protobuf import text_format

    schema: Any = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    source = tmp_path / "tiny.yaml"
    text = source.read_text(encoding="utf-8")
    source.write_text(text.replace("{runtime: openvino}", "{runtime: openvino, triton: true}"), encoding="utf-8")
    run = tmp_path / "runs" / "tiny"
    assert not (run / "triton").exists()
    done = cli("run", "tiny.yaml", "-q")
    assert done.returncode == 0, done.stderr
    folder = run / "triton" / "tiny_openvino"
    config = text_format.Parse((folder / "config.pbtxt").read_text(), schema.ModelConfig())
    assert config.output[0].label_filename == "labels.txt"
    assert (folder / "labels.txt").read_text().splitlines() == [str(i) for i in range(10)]
    report = json.loads((run / "report.json").read_text())
    deployed = run / "deploy" / "model.xml"
    assert report["shipped"] is not None
    assert (folder / "1" / "model.xml").read_bytes() == deployed.read_bytes(), "what the verdict ships"
    assert f"# {report['shipped']['model']}: the model that the verdict ships." in (folder / "config.pbtxt").read_text()
    trained = {curve["step"]: len(curve["losses"]) for curve in report["curves"]}
    assert trained["sparse/train"] == 12
    assert {"dense/train", "sparse/project_nm", "sparse/quantize"} <= set(trained)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert report["verdict"].replace("'", "&#39;") in page
    before = stamps(run)
    assert cli("run", "tiny.yaml", "-q").returncode == 0
    assert stamps(run) == before
    (folder / "1" / "model.bin").write_bytes(b"tampered")
    assert cli("run", "tiny.yaml", "-q").returncode == 0
    assert (folder / "1" / "model.bin").read_bytes() == (run / "deploy" / "model.bin").read_bytes()
    assert cli("run", "tiny.yaml", "-q", "--until", "dense/train").returncode == 0
    left = [name for name in ("triton", "deploy", "engines") if [*run.glob(f"{name}/**/*.*")]]
    assert not left, "engines of which the report knows nothing"
    assert cli("run", "tiny.yaml", "-q").returncode == 0
    assert (folder / "1" / "model.bin").is_file()
    source.write_text(text, encoding="utf-8")
    assert cli("run", "tiny.yaml", "-q").returncode == 0
    assert not (run / "triton").exists()
