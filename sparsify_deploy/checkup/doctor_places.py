"""Where work would be done: memory, limits, disks, and a run directory with its layout and its lock."""

from __future__ import annotations

import errno
import fcntl
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sparsify_deploy.artifacts import lock
from sparsify_deploy.checkup import run_directory
from sparsify_deploy.checkup.findings import Finding
from sparsify_deploy.errors import SparsifyError

_LEAST_FREE_GIB = 5.0
_FULL_GIB = 0.05
_LEAST_TEMPORARY_GIB = 1.0
_LEAST_MEMORY_GIB = 2.0
_LEAST_FILES = 1024
_LEAST_SHARED_MIB = 32
_PROBE_BYTES = 1 << 20


def limits() -> Iterator[Finding]:
    """What this process is allowed."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = "as many as it likes" if soft == resource.RLIM_INFINITY else str(soft)
    if soft != resource.RLIM_INFINITY and soft < _LEAST_FILES:
        more = 4096 if hard == resource.RLIM_INFINITY else min(hard, 4096)
        advice = f"ulimit -n {more}"
        if more < _LEAST_FILES:
            advice = "raise the hard limit (nofile in /etc/security/limits.conf, or docker run --ulimit nofile=4096)"
        yield Finding("open files", "warn", f"{allowed} at once, and libraries may want {_LEAST_FILES}", advice)
    else:
        yield Finding("open files", "ok", f"{allowed} at once")
    space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if space != resource.RLIM_INFINITY:
        detail = f"limited to {space / 2**30:.1f} GiB of addresses, of which torch reserves many that it does not use"
        yield Finding("memory limit", "warn", detail, "ulimit -v unlimited")


def memory(proc: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup/memory.max")) -> Iterator[Finding]:
    """How much memory is free, and how much a container may have; nothing where the system does not say."""
    if not proc.is_file():
        return
    fields = dict(line.split(":", 1) for line in proc.read_text(encoding="ascii").splitlines() if ":" in line)
    total, free = (int(fields.get(name, "0 kB").split()[0]) / 2**20 for name in ("MemTotal", "MemAvailable"))
    detail = f"{free:.1f} of {total:.1f} GiB are free"
    most = group.read_text(encoding="ascii").strip() if group.is_file() else "max"
    if most.isdecimal() and int(most) / 2**30 < total:
        free = min(free, int(most) / 2**30)
        detail += f", and this container may have {int(most) / 2**30:.1f} GiB"
    if free < _LEAST_MEMORY_GIB:
        advice = "end other programs (`ps aux --sort=-rss | head` shows the largest), or docker run --memory=8g"
        yield Finding("memory", "warn", detail, advice)
    else:
        yield Finding("memory", "ok", detail)


def shared_memory(folder: Path = Path("/dev/shm")) -> Iterator[Finding]:  # noqa: S108 it is what is looked at
    """Space for memory that processes share, which our own training does without."""
    if not folder.is_dir():
        return
    free_mib = shutil.disk_usage(folder).free / 2**20
    detail = f"{free_mib:.0f} MiB free in {folder}"
    if free_mib < _LEAST_SHARED_MIB:
        why = "which a data set of yours with worker processes, and NCCL, need"
        advice = f"docker run --shm-size=1g, or mount -o remount,size=1g {folder}"
        yield Finding("shared memory", "warn", f"{detail}, {why}", advice)
    else:
        yield Finding("shared memory", "ok", detail)


def disks(folder: Path) -> Iterator[Finding]:
    """The disk of `folder` and the one that temporary files go to: writable, and with room."""
    yield _disk("disk", folder, _LEAST_FREE_GIB, "choose another place with --run-dir")
    try:
        temporary = Path(tempfile.gettempdir())
    except FileNotFoundError as error:  # Python has tried to write everywhere
        text = f"there is none that can be written: {error.strerror or error}"
        yield Finding("temporary files", "warn", text, "export TMPDIR=FOLDER with one that can")
        return
    yield _disk("temporary files", temporary, _LEAST_TEMPORARY_GIB, "export TMPDIR=FOLDER with one that has room")


def run_findings(folder: Path) -> Iterator[Finding]:
    """Of the run directory `folder`: whether it is one, can be read and written, and whether a process works in it."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if folder.is_dir() and any(folder.iterdir()):
        yield _contents(folder)
        yield _holder(folder)
    elif folder.exists() and not folder.is_dir():
        yield Finding("run directory", "warn", f"{folder} is a file", "name a folder, such as runs/digits")
    else:
        yield Finding("run directory", "ok", f"{folder} holds nothing yet")
    yield _disk("its disk", there, _LEAST_FREE_GIB, "choose another place with --run-dir")


def _contents(folder: Path) -> Finding:
    try:
        found = run_directory.find(folder)
        entries, strays = found.entries(), list(found.strays())
    except SparsifyError as error:
        return Finding("run directory", "warn", " ".join(error.lines), "choose another place with --run-dir")
    except OSError as error:
        advice = f"chmod -R u+rwX {_quoted(folder)}"
        return Finding("run directory", "warn", f"{folder} cannot be read: {error.strerror}", advice)
    done = sum(not entry.unfinished for entry in entries)
    detail = f"{folder}: {done} results, {len(entries) - done} unfinished, {len(strays)} leftovers"
    return Finding("run directory", "ok", detail)


def _holder(folder: Path) -> Finding:
    path = folder / "store" / lock.NAME
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return Finding("its lock", "ok", "nobody has it")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # for a moment; whoever starts then waits for longer
    except BlockingIOError:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
        words = holder.split()
        end = f"kill {words[1]}" if len(words) > 1 and words[1].isdecimal() else "end it"
        return Finding("its lock", "warn", f"{holder} works in it", f"wait for it, or {end}, and it saves and ends")
    except OSError as error:
        advice = "choose a local disk with --run-dir"
        return Finding("its lock", "warn", f"its file system has no locks ({error.strerror})", advice)
    finally:
        os.close(descriptor)
    return Finding("its lock", "ok", "nobody has it")


def _disk(name: str, folder: Path, least_gib: float, elsewhere: str) -> Finding:
    free_gib = shutil.disk_usage(folder).free / 2**30
    detail = f"{free_gib:.1f} GiB free in {folder}"
    refused = _refused(folder)
    if refused is not None and refused.errno not in (errno.ENOSPC, errno.EDQUOT):
        return Finding(
            name, "warn", f"{folder} cannot be written: {refused.strerror}", _mend(refused, folder, elsewhere)
        )
    if refused is not None or free_gib < _FULL_GIB:
        what = "the quota is used up" if refused is not None and refused.errno == errno.EDQUOT else "the disk is full"
        advice = f"free some (`du -xh {_quoted(folder)} | sort -h | tail` shows what is large), or {elsewhere}"
        return Finding(name, "warn", f"{what}: {detail}", advice)
    if free_gib < least_gib:
        return Finding(name, "warn", detail, f"a run may need {least_gib:g} GiB: make room, or {elsewhere}")
    return Finding(name, "ok", detail)


def _refused(folder: Path) -> OSError | None:
    """Why a file of a megabyte cannot be written into `folder`; it is gone again afterwards."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    return None


def _mend(error: OSError, folder: Path, elsewhere: str) -> str:
    if error.errno == errno.EROFS:
        mounted = folder.resolve()
        while not mounted.is_mount():
            mounted = mounted.parent
        return f"mount -o remount,rw {_quoted(mounted)}, or {elsewhere}"
    return f"chmod u+rwx {_quoted(folder)} as its owner, or {elsewhere}"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
