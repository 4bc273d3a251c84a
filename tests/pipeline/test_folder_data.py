"""A folder of images through a run; what was left out of it stands in the report."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from sparsify_deploy import workspace
from sparsify_deploy.types import Silent

RECIPE = """\
version: 1
model: {source: builtin, params: {name: resnet8, width: 4, classes: 2}}
data:
  source: folder
  params: {path: images, size: 16, unreadable: skip, max_unreadable: 0.5}
training: {steps: 2, batch_size: 4}
nm: {fine_tune: {}, layers: pattern_possible}
"""


def test_a_folder_trains_and_what_it_left_out_is_in_the_report(tmp_path: Path) -> None:
    for split, count in (("train", 4), ("test", 2)):
        for label in ("cat", "dog"):
            (tmp_path / "images" / split / label).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (20, 18), (60 * i, 9, 200)).save(tmp_path / "images" / split / label / f"{i}.png")
    (tmp_path / "images" / "test" / "dog" / "1.png").write_bytes(b"cut")
    (tmp_path / "r.yaml").write_text(RECIPE)
    opened = workspace.open_run(tmp_path / "r.yaml", run_dir=tmp_path / "run")
    report = opened.run(Silent(), device="cpu", checkpoint_every_s=60)
    assert [note for note in report.notes if note.startswith("data:")] == [
        "data: the test split leaves out 1 of 4 images that cannot be read: test/dog/1.png"
    ]
    assert report.rows[0].model.examples == 3
