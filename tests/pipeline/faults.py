"""Deaths on demand: counts every call that changes the disk below a folder, and dies before or after the k-th.

A program of its own, a fork server: what the work needs is imported once, then each line of JSON on stdin is one trial
in a forked child, and each gets one line of JSON back. Nothing in the package knows of it: calls are wrapped from
outside. `{"run": FOLDER}` does the work and lists its points; with `"die": [k, "before" | "after" | "torn"]` the child
kills itself there; torn: what was about to be brought to the disk is cut in half first. With
`"signal": [number, PATTERN, seconds]` it is sent a real signal, so long after a file of that pattern is there, with
`"plain"` nothing is wrapped, and with `"no_estimate"` a run does not look for space before its stages.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Faults:
    """Wraps the calls; `points` are their labels in order, `early` what was renamed before it was on the disk."""

    def __init__(self, root: Path, die: tuple[int, str] | None) -> None:
        self.root, self.die = os.path.realpath(root), die
        self.points: list[str] = []
        self.early: list[str] = []
        self._lock = threading.RLock()
        self._before = {os.stat(os.path.join(top, f)).st_ino for top, _, files in os.walk(root) for f in files}
        self._written: dict[int, int] = {}
        self._synced: dict[int, int] = {}
        self._inner = threading.local()

    def label(self, *paths: str) -> str:
        short = [os.path.relpath(path, self.root) for path in paths]
        return " -> ".join(re.sub(r"-[0-9a-f]{64}|(?<=openvino-)\w+|(?<=onnxruntime-)\w+", "", path) for path in short)

    def inside(self, path: str) -> bool:
        return path.startswith(self.root + os.sep)

    def around(self, what: str, paths: tuple[str, ...], call: Callable[[], Any], torn: int | None = None) -> Any:
        """Make the call a point, if it is one of this work's own and not a part of another."""
        if not all(map(self.inside, paths)) or getattr(self._inner, "busy", False):
            return call()
        with self._lock:
            number = len(self.points)
            self.points.append(f"{what} {self.label(*paths)}")
            if self.die == (number, "torn") and torn is not None:
                path = f"/proc/self/fd/{torn}"
                if os.path.isfile(path):
                    os.truncate(path, os.stat(path).st_size // 2)
            if self.die in ((number, "before"), (number, "torn")):
                os.kill(os.getpid(), signal.SIGKILL)
            self._inner.busy = True
            try:
                found = call()
                self.note(what, paths)
            finally:  # a call that fails, as a mkdir of what is there, is a point too
                self._inner.busy = False
                if self.die == (number, "after"):
                    os.kill(os.getpid(), signal.SIGKILL)
            return found

    def note(self, what: str, paths: tuple[str, ...]) -> None:
        """Remember when each file was opened for writing and brought to the disk; judge what is renamed."""
        now = len(self.points)
        if what == "open":
            self._written[os.stat(paths[0]).st_ino] = now
        elif what == "fsync":
            self._synced[os.stat(paths[0]).st_ino] = now
        elif what in ("replace", "rename"):
            target = paths[1]
            files = [os.path.join(top, f) for top, _, names in os.walk(target) for f in names] or [target]
            for file in files if os.path.isdir(target) or os.path.isfile(target) else []:
                number = os.lstat(file).st_ino
                written = self._written.get(number, -1 if number in self._before else 0)
                doomed = target.endswith(".sparsify-old")
                if not doomed and not os.path.isdir(file) and self._synced.get(number, -1) < written:
                    self.early.append(f"{what} {self.label(*paths)}: {self.label(file)}")

    def install(self) -> None:
        """Wrap, for the life of this process."""
        real_open, real_os_open = builtins.open, os.open

        def at(path: Any, dir_fd: int | None = None) -> str:
            text = os.fspath(path)
            if dir_fd is not None:
                text = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), text)
            folder, name = os.path.split(os.path.abspath(text))
            return os.path.join(os.path.realpath(folder), name)

        def opening(file: Any, mode: str = "r", *rest: Any, **kw: Any) -> Any:
            if isinstance(file, int) or not set(mode) & set("wax+"):
                return real_open(file, mode, *rest, **kw)
            return self.around("open", (at(file),), lambda: real_open(file, mode, *rest, **kw))

        def syncing(real: Callable[[int], None]) -> Callable[[int], None]:
            def fsync(descriptor: int) -> None:
                path = os.readlink(f"/proc/self/fd/{descriptor}")
                self.around("fsync", (path,), lambda: real(descriptor), torn=descriptor)

            return fsync

        def two(what: str, real: Callable[..., None]) -> Callable[..., None]:
            def call(source: Any, target: Any, **kw: Any) -> None:
                self.around(what, (at(source), at(target)), lambda: real(source, target, **kw))

            return call

        def one(what: str, real: Callable[..., None]) -> Callable[..., None]:
            def call(path: Any, *rest: Any, dir_fd: int | None = None, **kw: Any) -> None:
                kw |= {"dir_fd": dir_fd} if dir_fd is not None else {}
                self.around(what, (at(path, dir_fd),), lambda: real(path, *rest, **kw))

            return call

        builtins.open = io.open = opening  # type: ignore[assignment]
        os.fsync = syncing(os.fsync)
        os.replace, os.rename = two("replace", os.replace), two("rename", os.rename)
        for name in ("unlink", "mkdir", "rmdir"):
            setattr(os, name, one(name, getattr(os, name)))
        os.remove = os.unlink
        assert real_os_open is os.open


# -- work: every way in which the package changes a run directory, in small -----------------------------------------


def small(run: Path, arguments: list[str]) -> None:
    """A store with four stages, one by step checkpoints and one made anew, and what is published from it."""
    import torch

    from sparsify_deploy.artifacts import durable
    from sparsify_deploy.artifacts.fingerprint import file_digest
    from sparsify_deploy.artifacts.store import ArtifactStore
    from sparsify_deploy.training import checkpoint

    store = ArtifactStore(run / "store")
    with store.lock():
        for name in ("old", "again", "train", "engine"):
            parts = {"stage": name, "settings": {"n": 1}}
            if name == "old":  # a result that is to be made anew
                if store.find(name, parts) is not None:
                    store.discard(name, parts)
                continue
            if name == "again":  # a result that a new one takes the place of, and that is always there from then on
                known = (run / "store" / "last" / "sparse.again.json").exists()
                assert not known or store.find(name, parts) is not None
                for _ in range(2):
                    (store.begin(name, parts) / "a.bin").write_bytes(b"a" * 300)
                    store.commit(name, parts, {"a": "a.bin"}, {}, 1.0, replace=True)
                    store.remember(f"sparse/{name}", parts)
                continue
            record = store.find(name, parts)
            if record is None:
                out = store.begin(name, parts)
                if name == "train":
                    path, state, start = out / "train.checkpoint", torch.ones(256), 0
                    if (saved := checkpoint.read(path)) is not None:
                        state, start = saved["state"], saved["step"]
                    for step in range(start, 3):
                        state = state * 1.5 + step
                        checkpoint.write(path, {"state": state, "step": step + 1})
                    (out / "weights.bin").write_bytes(state.numpy().tobytes())
                    store.commit(name, parts, {"weights": "weights.bin"}, {"loss": 0.5}, 1.0)
                else:
                    folder = out / "engine"
                    folder.mkdir(exist_ok=True)
                    for file in ("net.xml", "net.bin"):
                        (out / f"built.{file}").write_bytes(file.encode() * 300)
                        durable.move(out / f"built.{file}", folder / file)
                    durable.write_json(folder / "net.xml.json", {"format": 2})
                    store.commit(name, parts, {"engine": "engine"}, {}, 1.0)
                record = store.find(name, parts)
            assert record is not None
            store.remember(f"sparse/{name}", parts)
            store.check(record, next(iter(record.outputs)))
        engine = record.outputs["engine"]
        durable.sweep(run)
        with durable.replacing_folder(run / "deploy") as fresh:
            for file in sorted(os.listdir(engine)):
                durable.copy(engine / file, fresh / file, file_digest(engine / file))
            durable.write_json(fresh / "deploy.json", {"files": len(os.listdir(engine))})
        durable.write_text(run / "report.json", "{}\n")
        durable.write_text(run / "report.md", "# report\n")


def real(run: Path, arguments: list[str]) -> None:
    """The command line with these arguments, in this process."""
    from sparsify_deploy.__main__ import main

    if code := main([*arguments, "--run-dir", str(run)]):
        sys.stderr.flush()
        os._exit(code)


WORK: dict[str, Callable[[Path, list[str]], None]] = {"small": small, "real": real, "light": real}
"""`real` is ready for every stage, `light` for a recipe without INT8."""


def prepare(what: str) -> None:
    """Import what the work needs, and nothing that starts threads."""
    import torch

    torch.set_num_threads(1)
    if what == "light":
        names = (
            "sparsify_deploy.cli",
            "sparsify_deploy.workspace",
            "sparsify_deploy.training.loop",
            "sklearn.datasets",
        )
        for name in (*names, "onnx", "jinja2", "torch.onnx"):
            __import__(name)
        return
    small_needs = ("sparsify_deploy.artifacts.store", "sparsify_deploy.training.checkpoint")
    real_needs = (
        *("sparsify_deploy.cli", "sparsify_deploy.workspace", "sparsify_deploy.stages.quantize", "onnx", "jinja2"),
        *("sparsify_deploy.quantization.int8", "sparsify_deploy.training.loop", "sklearn.datasets", "torch.onnx"),
    )
    for name in small_needs if what == "small" else real_needs:
        __import__(name)


def trial(what: str, request: dict[str, Any], answer: int) -> None:
    """The child's side."""
    run = Path(request["run"])
    die = request.get("die")
    faults = Faults(run, (die[0], die[1]) if die else None)
    if not {"signal", "plain"} & request.keys():
        faults.install()
    if "no_estimate" in request:
        from sparsify_deploy import pipeline

        pipeline.check_space = lambda *_: None  # type: ignore[assignment]
    began = time.process_time()
    WORK[what](run, request.get("arguments", []))
    found = {"points": faults.points, "early": faults.early, "cpu_s": time.process_time() - began}
    os.write(answer, json.dumps(found).encode())


def serve(what: str) -> None:
    """Fork one child for every line on stdin."""
    prepare(what)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        file = Path(request.get("answer", request["run"])).with_name("answer.json")
        child = os.fork()
        if child == 0:
            try:
                with open(file.with_suffix(".err"), "w", encoding="utf-8") as said:
                    os.dup2(said.fileno(), 2)
                    os.dup2(said.fileno(), 1)
                answer = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                trial(what, request, answer)
                os._exit(0)
            except BaseException:  # noqa: BLE001 the parent reports it
                import traceback

                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
        reply: dict[str, Any] = {}
        if "signal" in request:
            number, pattern, after_s = request["signal"]
            status = ended(child, Path(request["run"]), pattern, after_s)
            if status is None:
                os.kill(child, number)
                began = time.monotonic()
            reply["hit"] = status is None
        else:
            status = None
        if status is None:
            _, status = os.waitpid(child, 0)
        if reply.get("hit"):
            reply["took_s"] = time.monotonic() - began
        code = reply["code"] = os.waitstatus_to_exitcode(status)
        if code == 0:
            reply |= json.loads(file.read_text(encoding="utf-8"))
        elif code != -signal.SIGKILL:
            reply["said"] = file.with_suffix(".err").read_text(encoding="utf-8")[-4000:]
        print(json.dumps(reply), flush=True)


def ended(child: int, run: Path, pattern: str, after_s: float) -> int | None:
    """Wait until a file of that pattern is there, and `after_s` more; the child's status where it ended before that."""
    until = float("inf")
    while time.monotonic() < until:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return status
        if until == float("inf") and any(run.glob(pattern)):
            until = time.monotonic() + after_s
        time.sleep(0.001)
    return None


def copied(source: Path, target: Path) -> Path:
    """A fresh copy of a folder, links kept; an empty one where there is none."""
    if target.exists():
        shutil.rmtree(target)
    if source.exists():
        shutil.copytree(source, target, symlinks=True)
    else:
        target.mkdir(parents=True)
    return target


if __name__ == "__main__":
    serve(sys.argv[1])
