"""Machines on which something is wrong, made real with packages, mounts, limits and locks, and what `doctor` says."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from sparsify_deploy.checkup import doctor, doctor_places
from sparsify_deploy.checkup.findings import Finding

NMS = "raise RuntimeError('operator torchvision::nms does not exist')"
SEGFAULT = "import ctypes; ctypes.string_at(0)"
NO_LIBRARY = "raise ImportError('libnvinfer.so.10: cannot open shared object file: No such file or directory')"


def install(site: Path, distribution: str, version: str, code: str | None, module: str = "") -> None:
    """A package as pip leaves it; without code as it leaves what another removal took the files of."""
    info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    if code is not None:
        package = site / (module or distribution.replace("-", "_"))
        package.mkdir(exist_ok=True)
        (package / "__init__.py").write_text(code)


def diagnosed(site: Path, *arguments: str, hidden: tuple[str, ...] = ()) -> dict[str, Finding]:
    """What `doctor --json` says where the packages of `site` come first and those `hidden` are not found."""
    if hidden:
        (site / "sitecustomize.py").write_text(
            "import importlib.machinery as m\nfind = m.PathFinder.find_spec.__func__\n"
            f"def found(cls, name, *more): return None if name in {hidden!r} else find(cls, name, *more)\n"
            "m.PathFinder.find_spec = classmethod(found)\n"
        )
    done = subprocess.run(
        [sys.executable, "-m", "sparsify_deploy", "doctor", "--json", *arguments],
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {row["name"]: Finding(**row) for row in json.loads(done.stdout)}


def test_broken_packages_are_named_with_the_command_that_mends_each(tmp_path) -> None:
    install(tmp_path, "torch", "2.13.0+cpu", "")
    install(tmp_path, "torchvision", "0.28.0", NMS)
    install(tmp_path, "openvino", "2026.4.1", SEGFAULT)
    install(tmp_path, "tensorrt", "10.3.0", NO_LIBRARY)
    install(tmp_path, "tensorrt-rtx-cu13", "1.7.1", "raise ValueError('no ABI')", "tensorrt_rtx")
    install(tmp_path, "onnxruntime", "1.32.0", "")
    install(tmp_path, "onnxruntime-gpu", "1.31.0", None)
    found = diagnosed(tmp_path)
    assert found["torch"].state == "ok"
    vision = found["torchvision"]
    assert vision.state == "warn"
    assert "0.28.0 beside torch 2.13.0+cpu, does not import: RuntimeError: operator torchvision::nms" in vision.detail
    assert vision.advice.endswith(
        "pip install --force-reinstall --no-deps torchvision==0.28.0+cpu --index-url "
        "https://download.pytorch.org/whl/cpu"
    )
    assert found["openvino"].state == "warn"
    assert "importing openvino crashed (SIGSEGV)" in found["openvino"].detail
    assert found["openvino"].advice == "pip install --force-reinstall openvino==2026.4.1"
    assert found["tensorrt"].state == "warn"
    assert "10.3.0, does not import: ImportError: libnvinfer.so.10" in found["tensorrt"].detail
    assert found["tensorrt"].advice == "pip install --force-reinstall tensorrt==10.3.0"
    assert found["tensorrt_rtx"].advice == "pip install --force-reinstall tensorrt-rtx-cu13==1.7.1"
    both = found["onnxruntime packages"]
    assert (both.state, both.detail) == ("warn", "onnxruntime 1.32.0 and onnxruntime-gpu 1.31.0")
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'sparsify-deploy[" in both.advice


def test_what_is_not_there_is_missing_and_what_pip_alone_believes_in_is_not(tmp_path) -> None:
    install(tmp_path, "torch", "2.13.0", "")
    install(tmp_path, "onnxruntime", "1.32.0", None)
    hidden = ("onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "torchvision", "modelopt")
    found = diagnosed(tmp_path, hidden=hidden)
    assert found["tensorrt"].state == "missing"
    assert "pip install 'sparsify-deploy[gpu]'" in found["tensorrt"].advice
    assert found["torchvision"].state == "missing"
    assert "pip install 'sparsify-deploy[vision]'" in found["torchvision"].advice
    assert found["onnxruntime"].state == "warn"
    assert found["onnxruntime"].detail == "pip lists onnxruntime 1.32.0, and its files are gone"
    assert found["onnxruntime"].advice == "pip install --force-reinstall onnxruntime==1.32.0"


@pytest.mark.parametrize(
    ("torch", "command"),
    [
        ("2.13.0", "torchvision==0.28.0"),
        ("2.10.1+cu130", "torchvision==0.25.1+cu130 --index-url https://download.pytorch.org/whl/cu130"),
        ("2.1.2+cpu", "torchvision==0.16.2+cpu --index-url https://download.pytorch.org/whl/cpu"),
        ("3.0.0", "pip install --force-reinstall torchvision"),
    ],
)
def test_each_torch_has_its_torchvision(torch, command) -> None:
    assert doctor._matching(torch).endswith(command)


def test_an_old_python_is_told_what_it_cannot(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "sys", SimpleNamespace(version_info=(3, 10, 14)))
    found = doctor._python()
    assert found.state == "warn"
    assert "python3.12 -m venv .venv && .venv/bin/pip install 'sparsify-deploy[train,cpu]'" in found.advice


def test_a_card_without_its_driver_is_not_no_card(tmp_path, monkeypatch) -> None:
    device = tmp_path / "0000:01:00.0"
    device.mkdir()
    (device / "vendor").write_text("0x10de\n")
    (device / "class").write_text("0x040300\n")
    assert not doctor._has_nvidia_card(tmp_path)  # its sound controller
    (device / "class").write_text("0x030000\n")
    assert doctor._has_nvidia_card(tmp_path)
    assert not doctor._has_nvidia_card(tmp_path / "nowhere")
    monkeypatch.setattr(doctor.environment, "fact", {"gpu": "none (driver/library mismatch)", "driver": "none"}.get)
    monkeypatch.setattr(doctor, "_has_nvidia_card", lambda: True)
    assert doctor._gpu().state == "warn"
    assert "nvidia-smi must list the card" in doctor._gpu().advice
    monkeypatch.setattr(doctor, "_has_nvidia_card", lambda: False)
    assert doctor._gpu().state == "missing"


# -- limits and memory -----------------------------------------------------------------------------------------------


def asked(code: str, **options: object) -> list[Finding]:
    """The findings of an expression over `places`, in a process of its own."""
    program = (
        "import json; from pathlib import Path; from sparsify_deploy.checkup import doctor_places as places\n"
        f"print(json.dumps([vars(each) for each in {code}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False, **options
    )
    assert done.returncode == 0, done.stderr
    return [Finding(**row) for row in json.loads(done.stdout)]


@pytest.mark.parametrize(
    ("soft", "hard", "state", "advice"),
    [
        (4096, 4096, "ok", ""),
        (256, 4096, "warn", "ulimit -n 4096"),
        (256, 2048, "warn", "ulimit -n 2048"),
        (256, 512, "warn", "/etc/security/limits.conf"),
    ],
)
def test_few_open_files(soft, hard, state, advice) -> None:
    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    (found,) = asked("places.limits()", preexec_fn=lower)
    assert (found.name, found.state) == ("open files", state)
    assert advice in found.advice
    assert str(soft) in found.detail


def test_a_limit_on_addresses() -> None:
    limit = 8 << 30
    found = asked("places.limits()", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))
    (one,) = [each for each in found if each.name == "memory limit"]
    assert (one.state, one.advice) == ("warn", "ulimit -v unlimited")
    assert "8.0 GiB" in one.detail


def test_memory_is_what_the_machine_has_free_and_the_container_allows(tmp_path) -> None:
    proc, group = tmp_path / "meminfo", tmp_path / "memory.max"
    proc.write_text("MemTotal:       16777216 kB\nMemAvailable:   12582912 kB\n")
    (free,) = doctor_places.memory(proc, group)
    assert (free.state, free.detail) == ("ok", "12.0 of 16.0 GiB are free")
    group.write_text("max\n")
    assert list(doctor_places.memory(proc, group)) == [free]
    group.write_text(f"{1 << 30}\n")
    (small,) = doctor_places.memory(proc, group)
    assert small.state == "warn"
    assert "this container may have 1.0 GiB" in small.detail
    assert "docker run --memory" in small.advice
    assert list(doctor_places.memory(tmp_path / "nothing")) == []


# -- disks and the run directory -------------------------------------------------------------------------------------


@pytest.fixture
def mounted() -> Callable[[str, str, str], list[Finding]]:
    """`mounted(options, prepare, code)`: `asked(code)` where a tmpfs with these options lies on PLACE."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], check=False).returncode != 0:
        pytest.skip("this system gives nobody a mount namespace")

    def ask(options: str, prepare: str, code: str) -> list[Finding]:
        program = (
            "import json; from pathlib import Path; from sparsify_deploy.checkup import doctor_places as places\n"
            f"print(json.dumps([vars(each) for each in {code}]))"
        )
        with tempfile.TemporaryDirectory() as place:
            script = f'mount -t tmpfs -o {options} none {place} && {prepare.replace("PLACE", place)} && exec "$@"'
            command = ["unshare", "-m", "sh", "-c", script, "sh", sys.executable, "-c", program.replace("PLACE", place)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if "mount:" in done.stderr:
            pytest.skip(f"no tmpfs here: {done.stderr.strip()}")
        assert done.returncode == 0, done.stderr
        return [Finding(**row) for row in json.loads(done.stdout)]

    return ask


def test_a_full_disk(mounted) -> None:
    found = mounted("size=4m", "{ cat /dev/zero > PLACE/x; true; } 2>/dev/null", "places.run_findings(Path('PLACE/r'))")
    disk = found[-1]
    assert (disk.name, disk.state) == ("its disk", "warn")
    assert disk.detail.startswith("the disk is full: 0.0 GiB free")
    assert "free some (`du -xh " in disk.advice
    assert "--run-dir" in disk.advice


def test_a_disk_that_is_nearly_full(mounted) -> None:
    (disk,) = mounted("size=500m", "true", "[places._disk('disk', Path('PLACE'), 5.0, 'go elsewhere')]")
    assert disk.state == "warn"
    assert disk.detail.startswith("0.5 GiB free")
    assert "a run may need 5 GiB" in disk.advice


def test_a_read_only_run_directory(mounted) -> None:
    prepare = "mkdir -p PLACE/r/store && touch PLACE/r/store/.lock && mount -o remount,ro PLACE"
    run, lock, disk = mounted("size=8m", prepare, "places.run_findings(Path('PLACE/r'))")
    assert (run.state, lock.state, disk.state) == ("ok", "ok", "warn")
    assert "cannot be written: Read-only file system" in disk.detail
    assert disk.advice.startswith("mount -o remount,rw /")


def test_small_shared_memory(mounted) -> None:
    (small,) = mounted("size=16m", "true", "places.shared_memory(Path('PLACE'))")
    assert (small.state, small.detail[:6]) == ("warn", "16 MiB")
    assert "docker run --shm-size=1g" in small.advice
    (large,) = mounted("size=64m", "true", "places.shared_memory(Path('PLACE'))")
    assert large.state == "ok"


def test_a_folder_of_someone_else(tmp_path, monkeypatch) -> None:
    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(doctor_places.tempfile, "TemporaryFile", refuse)
    disk = list(doctor_places.run_findings(tmp_path / "run"))[-1]
    assert (disk.state, disk.detail) == ("warn", f"{tmp_path} cannot be written: Permission denied")
    assert disk.advice.startswith(f"chmod u+rwx {tmp_path}")


def test_the_probe_leaves_nothing_behind(tmp_path) -> None:
    assert [each.state for each in doctor_places.disks(tmp_path)]
    assert not list(tmp_path.iterdir())


HOLD = """\
import sys, time
from pathlib import Path
from sparsify_deploy.artifacts.store import ArtifactStore
with ArtifactStore(Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_run_directory_with_its_holder_its_results_and_a_newer_layout(tmp_path) -> None:
    run = tmp_path / "run"
    assert next(each.detail for each in doctor_places.run_findings(run)) == f"{run} holds nothing yet"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run / "store")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        first, lock, _ = doctor_places.run_findings(run)
        assert (first.state, first.detail) == ("ok", f"{run}: 0 results, 0 unfinished, 0 leftovers")
        assert lock.state == "warn"
        assert f"process {holder.pid} on " in lock.detail
        assert f"kill {holder.pid}" in lock.advice
    finally:
        holder.kill()
        holder.communicate()
    assert list(doctor_places.run_findings(run))[1] == Finding("its lock", "ok", "nobody has it")
    (run / "store" / "layout.json").write_text('{"layout": 99}')
    newer = next(iter(doctor_places.run_findings(run)))
    assert newer.state == "warn"
    assert "layout" in newer.detail


def test_a_folder_that_is_no_run_directory(tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    found = next(iter(doctor_places.run_findings(tmp_path)))
    assert found.state == "warn"
    assert "no run in it" in found.detail
    assert next(iter(doctor_places.run_findings(tmp_path / "notes.txt"))).detail.endswith("is a file")
