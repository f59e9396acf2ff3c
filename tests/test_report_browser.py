"""The pages as a browser shows them: nothing overflows, overlaps, is cut off, is asked for or is out of reach."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fusepress.pipeline.comparing import compare_runs
from fusepress.pipeline.evidence import Measurement, RunRecord
from fusepress.pipeline.report.comparison import write_comparison
from fusepress.pipeline.report.explain import EXPLAIN_JSON
from fusepress.pipeline.report.html import write_report
from tests.browser import Browser, Theme, find_browser
from tests.test_report import ONNX, SAMPLES, check_page, record_of, run_dir_of
from tests.test_report_quantization import COVERAGE, LADDER, SENSITIVITY
from tests.test_report_sparsity import LAYERS
from tests.test_report_training import HISTORY, LOOKS

MOST_BYTES = 3_000_000
GROUND = {"light": (247, 247, 245), "dark": (17, 20, 23)}  # --bg of the style sheet
VIEWS: list[tuple[int, Theme]] = [(1200, "light"), (1200, "dark"), (480, "light"), (480, "dark")]

OVERLAPS = """(() => {
  const found = [];
  for (const svg of document.querySelectorAll('svg.chart')) {
    const frame = svg.viewBox.baseVal;
    const boxes = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBBox()]).filter(b => b[1].width > 0);
    const name = svg.getAttribute('aria-label').slice(0, 40);
    boxes.forEach(([words, a], index) => {
      if (a.x < -1 || a.y < -1 || a.x + a.width > frame.width + 1 || a.y + a.height > frame.height + 1)
        found.push(`${name}: ${words} leaves the drawing`);
      for (const [other, b] of boxes.slice(index + 1)) {
        const across = Math.min(a.x + a.width, b.x + b.width) - Math.max(a.x, b.x);
        const down = Math.min(a.y + a.height, b.y + b.height) - Math.max(a.y, b.y);
        if (across > 1 && down > 3) found.push(`${name}: ${words} lies on ${other}`);
      }
    });
  }
  return found;
})()"""
FOCUSABLE = "[...document.querySelectorAll('a[href], summary, [tabindex]')].filter(e => e.checkVisibility()).length"
FOCUSED = "(e => (e.getAttribute('aria-label') || e.textContent).trim())(document.activeElement)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium or Chrome here to show the pages")
    with Browser(program, tmp_path_factory.mktemp("profile")) as found:
        yield found


def full_record() -> RunRecord:
    """A run with everything that a report can show."""
    record = record_of()
    record.task["branches"] = {"camera": ["camera"], "lidar": ["lidar"]}
    stages = {stage.name: stage for stage in record.stages}
    stages["finetune"].details |= {"history": HISTORY, "looks": LOOKS}
    stages["sparsify"].details["layers"] = LAYERS
    stages["export"].details["sparsity"] = {"valid": 17, "dense": 6, "not_eligible": 3}
    stages["quantize"].details |= {"ladder": LADDER, "sensitivity": SENSITIVITY, "coverage": COVERAGE}
    stages["verify"].details["constant"] = {"miou": 0.16}
    for index, failure in enumerate(("camera_dark", "camera_noise", "lidar_rotated", "lidar_sparse", "stale_frame")):
        for severity in (1, 2, 3):
            for dense, value in (("dense.", 0.6 - 0.1 * severity), ("", 0.58 - 0.1 * severity - 0.01 * index)):
                name = f"robustness.{failure}.{severity}.{dense}miou"
                stages["verify"].measurements.append(Measurement(name=name, value=value, kind="simulated"))
    return record


def explanation() -> dict[str, Any]:
    bounds = ("compute", "memory", "launch")
    kernels = [
        {
            "name": f"{('camera', 'lidar', 'head')[index % 3]}.{index}/Conv",
            "op": "Conv",
            "precision": ("int8", "fp16")[index // 20],
            "ms": 0.02 + 0.01 * (index % 7),
            "macs": 1000 * index,
            "bound": bounds[index % 3],
        }
        for index in range(40)
    ]
    finding: dict[str, Any] = {
        "kind": "broken fusion",
        "where": "__myl_CastMulMulCastAddReluMulMinMax_myl0_7" * 2,
        "what": "w" * 90,
    }
    found = [finding | {"advice": "try another " * 9, "gain_ms": 0.1, "measured_ms": None} for _ in range(8)]
    latency = {"latency_ms": 2.61, "low_ms": 2.2, "high_ms": 3.1, "extrapolating": False, "layers": 3, "small": {}}
    return {"kind": "predicted", "onnx_sha256": ONNX, "findings": found, "kernels": kernels, **latency}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = run_dir_of(full_record(), tmp_path_factory.mktemp("full"))
    record = RunRecord.model_validate_json((folder / "run.json").read_text())
    (folder / EXPLAIN_JSON).write_text(json.dumps(explanation() | {"onnx_sha256": record.artifacts["onnx"].sha256}))
    return write_report(folder)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    runs = []
    for index, (name, drop) in enumerate((("pass", 0.0128), ("tight", 0.058), ("a-run-with-a-rather-long-name", 0.03))):
        record = record_of(drop=drop, name=name)
        for measurement in record.stages[-1].measurements:
            if measurement.name == "accuracy.miou":
                measurement.value -= 0.01 * index
            if measurement.name == "latency.mean_ms":
                measurement.value -= 0.4 * index
        runs.append(run_dir_of(record, folder / name))
        (runs[-1] / "recipe.json").write_text(json.dumps({"prune": {"macs": 0.4 - 0.1 * index}, "seed": 0}))
    return write_comparison(compare_runs(runs), folder / "compared.html")


def check_view(browser: Browser, page: Path, width: int, theme: Theme) -> None:
    """A page at a width in a theme, measured by the browser itself."""
    browser.open(page, width, theme)
    assert [url for url in browser.requests if not url.startswith("data:")] == [page.resolve().as_uri()]
    assert browser.complaints == []
    assert browser.run("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    assert browser.run(OVERLAPS) == []
    assert browser.run("getComputedStyle(document.body).backgroundColor") == f"rgb{GROUND[theme]}"


def check_source(browser: Browser, page: Path) -> None:
    """What the browser made of the source is what was written: it mended nothing."""
    text = page.read_text()
    assert len(text.encode()) < MOST_BYTES
    written = [tag for tag, _ in check_page(text).tags]
    assert browser.run("[...document.querySelectorAll('*')].map(e => e.localName)") == written


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_a_page_fits_asks_for_nothing_and_is_what_was_written(
    name: str, browser: Browser, request: pytest.FixtureRequest
) -> None:
    page: Path = request.getfixturevalue(name)
    for width, theme in VIEWS:
        check_view(browser, page, width, theme)
    check_source(browser, page)


def test_everything_is_reached_by_the_keyboard_and_said_by_a_screen_reader(browser: Browser, report: Path) -> None:
    browser.open(report, 1200, "light")
    browser.press_tab()
    assert browser.run(FOCUSED) == "Skip to the gates"
    for _ in range(browser.run(FOCUSABLE) - 1):
        browser.press_tab()
    assert browser.run(FOCUSED).startswith("All "), "the last is the list of all measurements"
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    shown = [node for node in nodes if not node["ignored"]]
    names = {role: [n["name"]["value"] for n in shown if n["role"]["value"] == role] for role in ("image", "region")}
    assert len(names["image"]) > 20
    assert all(names["image"])
    assert len(names["region"]) == len(set(names["region"])), "regions are told apart by their names"


@pytest.mark.long
@pytest.mark.parametrize(("width", "theme"), VIEWS)
def test_every_kind_of_run_is_shown_whole(width: int, theme: Theme, browser: Browser, tmp_path: Path) -> None:
    """With screenshots, which stay in the test's folder to be looked at."""
    for name, make in SAMPLES.items():
        page = write_report(run_dir_of(make(), tmp_path / name))
        check_view(browser, page, width, theme)
        check_source(browser, page)
        with Image.open(browser.screenshot(tmp_path / f"{name}-{width}-{theme}.png")) as shot:
            assert shot.width == width
            margin = shot.convert("RGB").crop((0, 0, 1, shot.height))
            assert margin.getcolors() == [(shot.height, GROUND[theme])], "the ground's colour all the way down"
            assert len(shot.convert("RGB").resize((60, 200)).getcolors(60 * 200) or []) > 50, "something is drawn"
