"""What it costs that nothing is lost: commits against plain writes, and step checkpoints against training.

A commit: one stage's outputs written, hashed, brought to the disk and renamed, against the same bytes written plainly
with one fsync a file, and against that with a sha256 of the bytes; rounds in turn, the medians of the ratios. `alone`
is what `commit` takes after a stage has written. `commit` hashes by BLAKE3; SHA-256 is there for comparison.
Checkpoints: ResNet-20 on images of CIFAR-10's size, drawn at random, in blocks with and without them in turn; what one
every 30 s costs follows from the seconds of one.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EVERY_S = 30.0


@contextmanager
def scratch(where: Path | None) -> Iterator[Path]:
    """An empty folder on the disk that is measured."""
    with tempfile.TemporaryDirectory(dir=where) as folder:
        yield Path(folder)


def commits(folder: Path, megabytes: int, files: int, rounds: int) -> dict[str, Any]:
    """A stage with so many equal files; seconds are medians."""
    from sparsify_deploy.artifacts.store import ArtifactStore

    size = megabytes * 10**6 // files
    content = [os.urandom(size) for _ in range(files)]
    names = {f"output{number}": f"{number}.bin" for number in range(files)}
    plain, whole, alone, hashing = [], [], [], []
    for turn in range(rounds + 1):
        os.sync()
        began = time.perf_counter()
        target = folder / "plain"
        target.mkdir()
        for name, data in zip(names.values(), content, strict=True):
            with (target / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        plain_s = time.perf_counter() - began
        shutil.rmtree(target)
        os.sync()
        store, parts = ArtifactStore(folder / "store"), {"turn": turn}
        with store.lock():
            began = time.perf_counter()
            out = store.begin("stage", parts)
            for name, data in zip(names.values(), content, strict=True):
                (out / name).write_bytes(data)
            written = time.perf_counter()
            store.commit("stage", parts, names, {}, 0.0)
            ended = time.perf_counter()
        began_hash = time.perf_counter()
        for data in content:
            hashlib.sha256(data).hexdigest()
        hashed = time.perf_counter() - began_hash
        shutil.rmtree(folder / "store")
        if turn:  # the first warms up
            plain.append(plain_s)
            whole.append(ended - began)
            alone.append(ended - written)
            hashing.append(hashed)
    return {
        "files": files,
        "megabytes": megabytes,
        "rounds": rounds,
        "plain_write_and_fsync_s": statistics.median(plain),
        "write_and_commit_s": statistics.median(whole),
        "commit_alone_s": statistics.median(alone),
        "sha256_s": statistics.median(hashing),
        "write_and_commit_ratio": statistics.median(w / p for w, p in zip(whole, plain, strict=True)),
        "commit_alone_ratio": statistics.median(a / p for a, p in zip(alone, plain, strict=True)),
        "write_and_commit_ratio_to_write_fsync_and_sha256": statistics.median(
            w / (p + h) for w, p, h in zip(whole, plain, hashing, strict=True)
        ),
    }


def checkpoints(folder: Path, blocks: int, steps: int) -> dict[str, Any]:
    """ResNet-20, batches of 128: CPU and wall time a step without checkpoints, and with one at the end of a block."""
    import torch

    from sparsify_deploy import menu
    from sparsify_deploy.tasks import classification
    from sparsify_deploy.training.loop import Trainer
    from sparsify_deploy.training.settings import Optimizer, Training
    from sparsify_deploy.training.updater import Dense
    from sparsify_deploy.types import Context

    torch.set_num_threads(1)
    torch.manual_seed(0)
    models = menu.entry("models", "builtin")
    model = models.build(models.Params(name="resnet20", in_channels=3))
    settings = Training(steps=steps, batch_size=128, optimizer=Optimizer(lr=0.1))
    split = _Drawn(torch.randn(2048, 3, 32, 32), torch.randint(0, 10, (2048,)))
    taken: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    written: list[tuple[float, float]] = []
    path = folder / "train.checkpoint"
    for block in range(2 * blocks + 1):
        task = classification.create(classification.Params())
        trainer = Trainer(model, task, split, ("input",), settings, seed=block, folder=folder, context=Context())
        saves, updater = bool(block % 2), Dense()
        trainer._fit = dataclasses.replace(trainer._fit, label="train")
        model.train()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            trainer.advance(updater)
        if saves:
            at_wall, at_cpu = time.perf_counter(), time.process_time()
            trainer._save(path, updater)
            written.append((time.perf_counter() - at_wall, time.process_time() - at_cpu))
        if block:
            taken[saves].append(((time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps))
    step_s, step_cpu_s = (statistics.median(each[i] for each in taken[False]) for i in (0, 1))
    saved_s, saved_cpu_s = (statistics.median(each[i] for each in written) for i in (0, 1))
    every = EVERY_S / step_s
    with_cpu_s = statistics.median(each[1] for each in taken[True])
    return {
        "blocks": blocks,
        "steps_a_block": steps,
        "checkpoint_bytes": path.stat().st_size,
        "step_s": step_s,
        "step_cpu_s": step_cpu_s,
        "checkpoint_s": saved_s,
        "checkpoint_cpu_s": saved_cpu_s,
        "steps_in_30_s": every,
        "cost_of_one_every_30_s": saved_s / EVERY_S,
        "cpu_cost_of_one_every_30_s": saved_cpu_s / (every * step_cpu_s),
        "cpu_a_step_with_one_a_block_against_without": with_cpu_s / step_cpu_s,
    }


class _Drawn:
    def __init__(self, images: Any, labels: Any) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Any) -> dict[str, Any]:
        return {"input": self.images[indices], "target": self.labels[indices]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dir", type=Path, help="a folder on the disk to measure; the default is that for temporary files"
    )
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="training steps a block")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with scratch(given.dir) as folder:
        found: dict[str, Any] = {
            "commits": [commits(folder, given.megabytes, files, given.rounds) for files in (1, 4)],
            "checkpoints": checkpoints(folder, given.blocks, given.steps),
        }
    if given.json:
        print(json.dumps(found, indent=1))
        return
    for row in found["commits"]:
        print(
            f"{row['megabytes']} MB in {row['files']} file(s): plain write + fsync "
            f"{row['plain_write_and_fsync_s']:.3f} s; write + commit {row['write_and_commit_s']:.3f} s, "
            f"{row['write_and_commit_ratio']:.2f}x; the commit alone {row['commit_alone_s']:.3f} s, "
            f"{row['commit_alone_ratio']:.2f}x; sha256 {row['sha256_s']:.3f} s, with "
            f"which write + commit is {row['write_and_commit_ratio_to_write_fsync_and_sha256']:.2f}x of the plain one"
        )
    row = found["checkpoints"]
    direct = row["cpu_a_step_with_one_a_block_against_without"] - 1
    print(
        f"ResNet-20, batch 128: a step {row['step_s'] * 1e3:.0f} ms, a checkpoint of "
        f"{row['checkpoint_bytes'] / 1e6:.1f} MB {row['checkpoint_s'] * 1e3:.1f} ms "
        f"({row['checkpoint_cpu_s'] * 1e3:.1f} ms of CPU time); one every 30 s costs "
        f"{row['cost_of_one_every_30_s']:.3%} of the time, {row['cpu_cost_of_one_every_30_s']:.3%} of the CPU time "
        f"(computed); one every {row['steps_a_block']} steps {direct:+.2%} CPU time a step (measured)"
    )


if __name__ == "__main__":
    main()
