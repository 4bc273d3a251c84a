"""The page in a real browser: it loads without an error, draws its charts, fetches nothing and runs nothing."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsify_deploy.reporting import page
from sparsify_deploy.reporting.tables import tables
from sparsify_deploy.reports import Curve, RunReport, Shipped

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "<script>alert(1)</script>\"'\N{GREEK SMALL LETTER ALPHA}"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")

LOOK = """
const boxes = (kind) => [...document.querySelectorAll(kind)].map((e) => {
  const b = e.getBoundingClientRect(); return [b.left, b.top, b.width, b.height]; });
const found = {
  svg: boxes("svg"), circles: boxes("svg circle"), bars: boxes("svg .measured"),
  paths: [...document.querySelectorAll("svg path.line")].map((e) => e.getTotalLength()),
  outside: [...document.querySelectorAll("svg text")].filter((e) => {
    const t = e.getBoundingClientRect(), s = e.ownerSVGElement.getBoundingClientRect();
    return t.left < s.left - 1 || t.right > s.right + 1 || t.top < s.top - 1 || t.bottom > s.bottom + 1;
  }).map((e) => e.textContent),
  rows: [...document.querySelectorAll("section > .scroll > table")].map((e) => e.tBodies[0].rows.length),
  wide: document.documentElement.scrollWidth, window: window.innerWidth,
  heading: document.querySelector("h1").textContent, scripts: document.scripts.length,
  resources: performance.getEntriesByType("resource").map((e) => e.name),
};
document.title = JSON.stringify(found);
"""


@pytest.fixture
def look(report: RunReport, tmp_path: Path) -> Callable[[int], tuple[RunReport, dict[str, Any], str]]:
    """Open the page of a report with hostile names in a window; returns the report, what was seen, and the log.

    Its own policy lets no script run, so the one that looks is put into a copy whose policy allows that one alone.
    """

    def run(width: int) -> tuple[RunReport, dict[str, Any], str]:
        row = report.rows[-1]
        layers = tuple(dataclasses.replace(row.model.layers[0], name=f"{HOSTILE}{i}") for i in range(3))
        changed = dataclasses.replace(
            report,
            recipe=HOSTILE,
            rows=(*report.rows[:-1], dataclasses.replace(row, model=dataclasses.replace(row.model, layers=layers))),
            curves=(Curve(HOSTILE, tuple((i, 2.0 / i) for i in range(1, 60))),),
            shipped=Shipped("dense INT8", "openvino", (), 0.89, "how"),
        )
        text = page.page(changed, page.fingerprint(changed))
        policy = "default-src 'none'; style-src 'unsafe-inline'"
        assert text.count(policy) == 1
        text = text.replace(policy, f"{policy}; script-src 'nonce-look'")
        text = text.replace("</body>", f'<script nonce="look">{LOOK}</script></body>')
        path = tmp_path / "report.html"
        path.write_text(text, encoding="utf-8")
        flags = [
            *("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", "--no-first-run"),
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={width},900",
            "--host-resolver-rules=MAP * ~NOTFOUND",
        ]
        done = subprocess.run(
            [str(CHROMIUM), *flags, "--dump-dom", path.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
        assert title is not None
        import html

        return changed, json.loads(html.unescape(title[1])), done.stderr

    return run


@pytest.mark.parametrize("width", [1200, 500])
def test_the_page_in_a_browser(look: Callable[[int], tuple[RunReport, dict[str, Any], str]], width: int) -> None:
    report, seen, log = look(width)
    assert "CONSOLE" not in log, log
    assert seen["resources"] == []
    assert seen["scripts"] == 1, "the one that looks"
    assert seen["heading"] == HOSTILE
    assert len(seen["svg"]) == 1 + 1 + 3
    for box in (*seen["svg"], *seen["circles"], *seen["bars"]):
        assert box[2] > 0
        assert box[3] > 0
    assert seen["paths"][0] > 100
    assert seen["outside"] == [], "clipped labels"
    assert seen["wide"] <= seen["window"], "only tables scroll sideways"
    shown = [len(table.rows) for table in tables(report)]
    assert seen["rows"] == [*shown, 3, len(report.steps)]
