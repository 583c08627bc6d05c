"""The report in a browser: it says nothing to the console, asks for nothing, fits a phone, and prints all it hides on the screen."""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from landscape.plotting.report import write_report
from landscape.plotting.view import RunView

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
PHONE = 360
"""Width of a small phone, in CSS pixels. A headless window is no narrower than 500, so the page is shown in a frame."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on PATH, to look at the report as a reader does"),
]

MEASURE_FRAME = """<!DOCTYPE html><meta charset="utf-8"><link rel="icon" href="data:,"><body style="margin:0">
<iframe id="frame" src="report.html" style="border:0;height:800px;width:%dpx"></iframe><script>
document.getElementById("frame").onload = function () {
  const page = this.contentDocument, width = this.contentWindow.innerWidth, wide = [];
  const contained = e => e.closest(".scroll, .card, pre");
  for (const e of page.querySelectorAll("main *")) {
    if (!contained(e.parentElement) && e.getBoundingClientRect().right > width + 0.5) wide.push(e.tagName + "." + e.className);
  }
  const figures = [...page.querySelectorAll("img")].map(i => i.naturalWidth > 0 ? i.clientWidth : 0);
  document.body.dataset.result = JSON.stringify({inner: width, scroll: page.documentElement.scrollWidth, wide,
    hidden: [...page.querySelectorAll("table.verdicts")].map(t => t.parentElement.scrollWidth - t.parentElement.clientWidth),
    verdict: Math.max(...[...page.querySelectorAll("table.verdicts td:nth-child(2) .verdict")].map(v => v.getBoundingClientRect().right)),
    figures: Math.min(...figures), size: getComputedStyle(page.body).fontSize, paper: getComputedStyle(page.body).backgroundColor,
    card: getComputedStyle(page.querySelector(".card")).backgroundColor});
};</script>"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, and notes what was asked for."""

    asked: list[str]

    def log_message(self, format: str, *arguments: object) -> None:
        self.asked.append(self.path)


@pytest.fixture(scope="module")
def folder(views: list[RunView], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    write_report(folder / "report.html", [v for v in views if v.variant in ("ssgd", "dpsgd")], title="Seen in a browser", conclusions=["One:\nfirst\nsecond"])  # fmt: skip
    (folder / "phone.html").write_text(MEASURE_FRAME % PHONE)
    (folder / "desk.html").write_text(MEASURE_FRAME % 1280)
    return folder


@pytest.fixture
def site(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The folder's address, and what is asked of it."""
    asked: list[str] = []
    handler = functools.partial(type("Handler", (Quiet,), {"asked": asked}), directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


def chromium(tmp_path: Path, address: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Look at a page; its document on stdout, its console among stderr."""
    assert CHROMIUM is not None
    root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    command = [CHROMIUM, "--headless=new", *root, "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-dev-shm-usage",
               "--enable-logging=stderr", "--v=0", "--virtual-time-budget=20000", f"--user-data-dir={tmp_path / 'profile'}", *flags, address]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)


def console(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_the_console_is_empty_and_the_page_is_all_that_is_asked_for(
    site: tuple[str, list[str]], folder: Path, tmp_path: Path
) -> None:
    address, asked = site
    (folder / "broken.html").write_text(
        "<link rel=icon href='data:,'><script>console.error('seen')</script><img src=missing.png>"
    )
    assert any("seen" in line for line in console(chromium(tmp_path, f"{address}/broken.html", "--dump-dom")))
    assert asked == ["/broken.html", "/missing.png", "/missing.png"] or set(asked) == {"/broken.html", "/missing.png"}
    asked.clear()  # or silence would mean nothing
    done = chromium(tmp_path, f"{address}/report.html", "--dump-dom")
    assert "Seen in a browser" in done.stdout
    assert console(done) == []
    assert asked == ["/report.html"]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(("page", "width"), [("phone", PHONE), ("desk", 1280)])
def test_nothing_leaves_the_page_sideways_and_figures_can_be_read(
    page: str, width: int, dark: bool, site: tuple[str, list[str]], tmp_path: Path
) -> None:
    import html
    import json

    address, _ = site
    flags = ("--window-size=1400,1000", f"--blink-settings=preferredColorScheme={0 if dark else 1}")
    done = chromium(tmp_path, f"{address}/{page}.html", "--dump-dom", *flags)
    told = re.search(r'data-result="([^"]*)"', done.stdout)
    assert told is not None, done.stderr[-2000:]
    found = json.loads(html.unescape(told.group(1)))
    assert found["inner"] == width
    assert found["scroll"] <= width
    assert found["wide"] == []
    assert found["verdict"] <= width - 8  # the run's verdicts are seen without scrolling
    assert page == "phone" or set(found["hidden"]) == {0}
    assert found["figures"] >= 400  # pixels, of pictures that did load: their text is then at least 8 pixels high
    assert found["size"] == "16px"
    assert found["card"] == "rgb(255, 255, 255)"  # figures are drawn for white, in the dark too
    assert (found["paper"] == "rgb(255, 255, 255)") is not dark


def test_print_shows_what_is_folded_on_the_screen(site: tuple[str, list[str]], folder: Path, tmp_path: Path) -> None:
    """The printed report has more pages than one whose folded parts are taken away."""
    address, _ = site
    text = (folder / "report.html").read_text(encoding="utf-8")
    (folder / "short.html").write_text(re.sub(r"<details>.*?</details>", "", text, flags=re.S), encoding="utf-8")
    pages = {}
    for name in ("report", "short"):
        chromium(tmp_path, f"{address}/{name}.html", f"--print-to-pdf={tmp_path / name}.pdf", "--no-pdf-header-footer")
        pages[name] = len(re.findall(rb"/Type\s*/Page\b", (tmp_path / f"{name}.pdf").read_bytes()))
    assert pages["report"] > pages["short"] > 1
