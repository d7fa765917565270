"""The report in headless Chromium: it works without a network, and shows what the sweep gives."""

from __future__ import annotations

import base64
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")

from report_sources import LOGS, benchmark, certificate, corpus_rows, made_up_trace
from tiny_models import early_exit_model, random_batch

from fastkd.data.rows import load_rows
from fastkd.exits.trace import ExitTrace
from fastkd.report import Source, write_page
from fastkd.report.content import SPEEDS

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")
pytestmark = pytest.mark.skipif(
    BROWSER is None or DRIVER is None,
    reason="no Chromium with chromedriver here: install chromium and chromium-driver to test the page",
)

from selenium.webdriver.common.by import By  # noqa: E402  # not before it is known to be there
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

FULL_MODELS = [("stream", "fastkd, 32"), ("1", "fastkd"), ("32", "fastkd")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def traces() -> dict[str, ExitTrace]:
    rows = corpus_rows()
    return {"first": made_up_trace(rows), "other": made_up_trace(rows, exit_layers=(1, 3, 6))}


@pytest.fixture(scope="module")
def page(traces: dict[str, ExitTrace], tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = corpus_rows()
    path = tmp_path_factory.mktemp("page") / "report.html"
    full = Source("first", traces["first"], benchmark().to_dict(), LOGS, certificate(), rows, rows.label_names)
    write_page({"first": (full, "entropy"), "other": (Source("other", traces["other"]), "margin")}, path)
    return path


@pytest.fixture
def opened(browser: Any, page: Path) -> Callable[..., Any]:
    def open_page(path: Path = page, *, width: int = 1280, dark: bool = False) -> Any:
        emulate(browser, width, dark)
        browser.get_log("browser")
        browser.get(path.as_uri())
        wait(browser, "return document.documentElement.dataset.ready === 'true'")
        return browser

    return open_page


def emulate(browser: Any, width: int, dark: bool) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def wait(browser: Any, script: str, *arguments: Any) -> None:
    WebDriverWait(browser, 60, 0.05).until(lambda it: it.execute_script(script, *arguments))


def move(browser: Any, speed: float) -> None:
    browser.execute_script(
        "const slider = document.getElementById('speed'); slider.value = arguments[0];"
        "slider.dispatchEvent(new Event('input'))",
        speed,
    )
    wait(browser, "return document.getElementById('speed-value').textContent === String(arguments[0])", speed)


def exact(browser: Any, name: str) -> str:
    return browser.find_element(By.ID, name).get_attribute("data-value")


def operating_point(browser: Any, chart: str, curve: int = 0) -> tuple[float, float]:
    """Where the dot of a curve lies on one panel of figure 3."""
    x, y = browser.execute_script(
        "const drawn = document.getElementById(arguments[0]).data.filter((trace) => trace.meta !== 'band');"
        "const dot = drawn[2 * arguments[1] + 1]; return [dot.x[0], dot.y[0]]",
        chart,
        curve,
    )
    return x, y


@pytest.mark.slow
def test_loads_without_errors_and_without_a_network(opened: Callable[..., Any]) -> None:
    browser = opened()
    for speed in (0, 0.205, 0.8, 1):
        move(browser, speed)
    assert browser.get_log("browser") == []
    requests = browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [name for name in requests if not name.startswith(("data:", "blob:"))] == []
    charts = browser.find_elements(By.CSS_SELECTOR, ".chart")
    assert len(charts) == 8
    for chart in charts:
        assert chart.find_elements(By.CSS_SELECTOR, ".main-svg"), chart.get_attribute("id")
        assert chart.get_attribute("aria-label")


@pytest.mark.parametrize("speed", [0, 0.1, 0.355, 0.8, 1])
def test_slider_moves_the_numbers_to_those_of_the_sweep(
    opened: Callable[..., Any], traces: dict[str, ExitTrace], speed: float
) -> None:
    browser = opened()
    move(browser, speed)
    row = traces["first"].sweep([speed])[0]
    assert row.accuracy is not None
    assert float(exact(browser, "accuracy")) == row.accuracy
    assert float(exact(browser, "layers")) == row.average_layers
    assert float(exact(browser, "flops")) == row.speedup["fastbert"]
    shown = {name: browser.find_element(By.ID, name).text for name in ("accuracy", "layers", "flops")}
    assert shown["accuracy"].replace("\u00a0", " ") == f"{100 * row.accuracy:.2f} %"
    assert shown["layers"].split() == [f"{row.average_layers:.2f}", "of", "6"]
    assert shown["flops"] == f"{row.speedup['fastbert']:.2f}×"
    assert operating_point(browser, "speed-accuracy") == (speed, row.accuracy)
    assert operating_point(browser, "speed-speedup") == (speed, row.speedup["fastbert"])
    assert operating_point(browser, "speedup-accuracy") == (row.speedup["fastbert"], row.accuracy)
    heights = browser.execute_script("return document.getElementById('exits').data[0].customdata")
    assert heights == row.exits_per_layer
    # the dot of the other curve moves along
    other = traces["other"].sweep([speed], "margin")[0]
    assert operating_point(browser, "speed-accuracy", curve=1) == (speed, other.accuracy)


def test_measured_speed_up_is_a_measurement_or_a_range_of_two(opened: Callable[..., Any]) -> None:
    browser = opened()
    shown = {}
    for speed in (0, 0.05, 0.3, 0.5, 0.8, 0.9):
        move(browser, speed)
        shown[speed] = [browser.find_element(By.ID, name).text for name in ("measured", "measured-note")]
    assert shown[0][0] == "1.00×"
    assert shown[0.05] == ["0.88×", "measured at 0.1, the lowest speed measured; fp32, stream"]
    assert shown[0.3][0] == "1.60×"
    assert shown[0.5] == ["1.60–4.00×", "measured at 0.3 and 0.8; fp32, stream"]
    assert shown[0.8] == ["4.00×", "320 rows/s; fp32, stream"]
    assert shown[0.9] == ["4.00×", "measured at 0.8, the highest speed measured; fp32, stream"]


def test_measurements_show_the_stream_first(opened: Callable[..., Any]) -> None:
    browser = opened()
    forms = [f"{dtype}, {form}" for dtype in ("fp32", "bf16") for form in ("stream", "batch 1", "batch 32")]
    options = browser.find_elements(By.CSS_SELECTOR, "#setting option")
    assert [option.get_attribute("textContent") for option in options] == forms
    bars = browser.execute_script("return document.getElementById('bench').data[1].x")
    assert bars == [form.replace(", batch ", "<br>").replace(", ", "<br>") for form in forms]
    assert "The stream takes rows as they come" in browser.find_element(By.ID, "bench-lead").text
    rows = browser.execute_script(
        "return [...document.querySelectorAll('#bench-table tbody tr')].map((row) =>"
        "[1, -1].map((cell) => [...row.cells].at(cell).textContent))"
    )
    assert rows == [[size, full] for size, full in FULL_MODELS for _ in range(3)] * 2


def test_measurements_of_older_versions_have_no_stream(opened: Callable[..., Any], tmp_path: Path) -> None:
    older = benchmark().to_dict()
    older["rows"] = [row for row in older["rows"] if row["batch_size"] is not None]
    for row in older["rows"]:
        del row["full_batch_size"]
    write_page({"old": (Source("old", made_up_trace(corpus_rows()), older), "entropy")}, tmp_path / "old.html")
    browser = opened(tmp_path / "old.html")
    options = browser.find_elements(By.CSS_SELECTOR, "#setting option")
    assert options[0].get_attribute("textContent") == "fp32, batch 1"
    assert "stream takes" not in browser.find_element(By.ID, "bench-lead").text
    last = browser.find_element(By.CSS_SELECTOR, "#bench-table tbody tr td:last-child")
    assert last.get_attribute("textContent") == "fastkd"
    assert browser.get_log("browser") == []


def test_keyboard_alone_moves_everything(opened: Callable[..., Any]) -> None:
    browser = opened()
    slider = browser.find_element(By.ID, "speed")
    before = exact(browser, "layers")
    slider.send_keys(Keys.HOME)
    wait(browser, "return document.getElementById('speed-value').textContent === '0'")
    slider.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    wait(browser, "return document.getElementById('speed-value').textContent === '0.01'")
    assert exact(browser, "layers") != before
    slider.send_keys(Keys.TAB)
    assert browser.switch_to.active_element.text == "0"
    browser.switch_to.active_element.send_keys(Keys.TAB, Keys.TAB)
    browser.switch_to.active_element.send_keys(Keys.SPACE)
    wait(browser, "return document.getElementById('speed-value').textContent === '0.3'")
    certified = browser.find_element(By.XPATH, "//button[contains(., '0.355')]")
    certified.send_keys(Keys.ENTER)
    wait(browser, "return document.getElementById('speed-value').textContent === '0.355'")


def test_another_curve_shows_its_own_numbers(opened: Callable[..., Any], traces: dict[str, ExitTrace]) -> None:
    browser = opened()
    assert "Calibrated for speed 0.355." in browser.find_element(By.ID, "certificate").text
    browser.execute_script(
        "const choice = document.getElementById('curve'); choice.value = 1; choice.dispatchEvent(new Event('change'))"
    )
    wait(browser, "return document.getElementById('subtitle').textContent.startsWith('other')")
    wait(browser, "return document.getElementById('arrivals').layout.xaxis.ticktext.length === 3")
    row = traces["other"].sweep([0.5], "margin")[0]
    assert float(exact(browser, "accuracy")) == row.accuracy
    for part in ("measured-card", "bench-section", "certificate-section", "training-section", "examples-section"):
        assert not browser.find_element(By.ID, part).is_displayed(), part
    assert browser.get_log("browser") == []


def test_bands_are_the_intervals_of_the_sweep(opened: Callable[..., Any], traces: dict[str, ExitTrace]) -> None:
    browser = opened()
    for chart in ("speed-accuracy", "speedup-accuracy"):
        edges = browser.execute_script(
            "return document.getElementById(arguments[0]).data.filter((drawn) => drawn.meta === 'band')"
            ".map((drawn) => drawn.y)",
            chart,
        )
        for trace, criterion, edge in zip(traces.values(), ("entropy", "margin"), edges, strict=True):
            intervals = [row.interval for row in trace.sweep(SPEEDS, criterion)]
            assert sorted(edge) == pytest.approx(sorted(bound for pair in intervals for bound in pair or ()))


def test_speeds_stand_at_points_of_the_trade(opened: Callable[..., Any], traces: dict[str, ExitTrace]) -> None:
    marks = opened().execute_script("return document.getElementById('speedup-accuracy').layout.annotations")
    assert len(marks) >= 3
    for mark in marks:
        row = traces["first"].sweep([float(mark["text"])])[0]
        assert (mark["x"], mark["y"]) == (row.speedup["fastbert"], row.accuracy)


def test_the_page_talks_to_readers_only(opened: Callable[..., Any], tmp_path: Path) -> None:
    bare = made_up_trace(corpus_rows(), labelled=False)
    write_page({"a": (Source("a", bare), "entropy")}, tmp_path / "a.html")
    for browser in (opened, partial(opened, tmp_path / "a.html")):
        text = browser().execute_script("return document.body.innerText")
        assert not re.search(r"fastkd [a-z]|--[a-z]|\.json|ExitTrace|MODEL|DATA", text), text


def test_slower_speeds_are_called_so(opened: Callable[..., Any], tmp_path: Path) -> None:
    trace = made_up_trace(corpus_rows())
    sure_of_nothing = replace(trace, logits=trace.logits * 0.01)
    assert sure_of_nothing.sweep([0.5]).slower_than_full() == [0.5]
    write_page({"slow": (Source("slow", sure_of_nothing), "entropy")}, tmp_path / "slow.html")
    browser = opened(tmp_path / "slow.html")
    assert browser.find_element(By.ID, "flops-note").text.startswith("slower than the full model: ")
    move(browser, 0)
    assert "slower" not in browser.find_element(By.ID, "flops-note").text


@pytest.mark.parametrize("width", [920, 1024, 1280])
def test_the_three_charts_of_the_trade_share_a_line(opened: Callable[..., Any], width: int) -> None:
    browser = opened(width=width)
    boxes = [figure.rect for figure in browser.find_elements(By.CSS_SELECTOR, ".thirds figure")]
    assert len(boxes) == 3
    assert len({box["y"] for box in boxes}) == 1
    for name in ("speed-accuracy", "speedup-accuracy"):
        ends = browser.execute_script(
            "const chart = document.getElementById(arguments[0]), xs = chart.data.flatMap((trace) => trace.x);"
            "return [...chart.layout.xaxis.range, Math.min(...xs), Math.max(...xs)]",
            name,
        )
        assert ends[0] < ends[2] < ends[3] < ends[1], "the ends of the curves lie inside the chart"


@pytest.mark.parametrize("width", [360, 400, 768, 1280])
def test_readable_at_every_width(opened: Callable[..., Any], width: int) -> None:
    browser = opened(width=width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    for element in browser.find_elements(By.CSS_SELECTOR, ".headline .card, .chart .main-svg, .controls"):
        box = element.rect
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width + 1, element.get_attribute("class")
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('p, li, output, dd, .chips span')]"
        ".filter((element) => element.textContent).map((element) => parseFloat(getComputedStyle(element).fontSize))"
    )
    assert min(sizes) >= 12


def test_dark_mode_changes_colours(opened: Callable[..., Any]) -> None:
    def colours(dark: bool) -> list[list[int]]:
        browser = opened(dark=dark)
        found = browser.execute_script(
            "const style = getComputedStyle(document.body);"
            "const tick = document.querySelector('#speed-accuracy .xtick text');"
            "return [style.backgroundColor, style.color, getComputedStyle(tick).fill]"
        )
        return [[int(value) for value in re.findall(r"\d+", text)[:3]] for text in found]

    light, dark = colours(False), colours(True)
    assert sum(light[0]) > 600 > 300 > sum(light[1])
    assert sum(dark[0]) < 150
    for ink in dark[1:]:
        assert sum(ink) > 600
    assert sum(light[2]) < 300


def test_dark_mode_reaches_charts_that_are_already_drawn(browser: Any, opened: Callable[..., Any]) -> None:
    opened()
    emulate(browser, 1280, dark=True)
    wait(browser, "return document.getElementById('exits').layout.font.color === '#e9edf4'")


def test_examples_say_where_they_left(opened: Callable[..., Any], traces: dict[str, ExitTrace]) -> None:
    browser = opened()
    move(browser, 0.3)
    layers = traces["first"].answers(0.3).exit_layer
    for name, layer in (("first", int(layers.min())), ("last", int(layers.max()))):
        items = browser.find_elements(By.CSS_SELECTOR, f"#{name} li")
        assert len(items) == 5
        assert items[0].find_element(By.CSS_SELECTOR, ".layer").text == f"layer {layer}"


def test_prints_in_light_colours_and_comes_back(browser: Any, opened: Callable[..., Any]) -> None:
    opened(dark=True)
    pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    assert pdf.startswith(b"%PDF")
    wait(browser, "return !document.documentElement.hasAttribute('data-print')")
    wait(browser, "return document.getElementById('exits').layout.font.color === '#e9edf4'")
    assert browser.get_log("browser") == []


def test_page_without_labels_hides_what_needs_them(opened: Callable[..., Any], tmp_path: Path) -> None:
    trace = made_up_trace(corpus_rows(), labelled=False)
    write_page({"bare": (Source("bare", trace), "entropy")}, tmp_path / "bare.html")
    browser = opened(tmp_path / "bare.html")
    assert browser.find_element(By.ID, "accuracy").text == "–"
    assert not browser.find_element(By.ID, "reliability").is_displayed()
    assert browser.find_element(By.ID, "speed-speedup").is_displayed()
    assert browser.get_log("browser") == []


def test_page_of_a_regression_shows_its_correlation(opened: Callable[..., Any], tmp_path: Path) -> None:
    labelled = {**random_batch(rows=60), "labels": torch.randn(60)}
    trace = replace(early_exit_model(num_labels=1).trace([labelled]), rows=torch.arange(60))
    rows = [f"{label}\ttext {row}" for row, label in enumerate(labelled["labels"].tolist())]
    (tmp_path / "rows.tsv").write_text("\n".join(["label\ttext_a", *rows]) + "\n", encoding="utf-8")
    measured = benchmark()
    scored = [replace(row, accuracy=None, pearson=0.75) for row in measured.rows]
    source = Source(
        "scores", trace, {**replace(measured, rows=scored).to_dict(), "criterion": "agreement"},
        examples=load_rows(tmp_path / "rows.tsv", num_labels=1),
    )  # fmt: skip
    write_page({"scores": (source, "agreement")}, tmp_path / "scores.html")
    browser = opened(tmp_path / "scores.html")
    assert browser.find_element(By.ID, "accuracy-heading").text == "Correlation"
    assert browser.find_element(By.ID, "accuracy").text == f"{trace.sweep([0.5])[0].pearson:.4f}"
    note = browser.find_element(By.ID, "accuracy-note").text.replace("\u00a0", " ")
    assert "in the full model; 95 % confidence: " in note
    for chart in ("speed-accuracy", "speed-speedup", "speedup-accuracy", "reliability"):
        assert browser.find_element(By.ID, chart).is_displayed(), chart
    captions = [caption.text for caption in browser.find_elements(By.TAG_NAME, "figcaption")]
    assert {"Correlation by speed", "Correlation by FLOPs speed-up"} <= set(captions)
    assert "Mean absolute error by uncertainty, head by head" in captions
    assert operating_point(browser, "speed-accuracy")[1] == trace.sweep([0.5])[0].pearson
    assert "label: " in browser.find_element(By.CSS_SELECTOR, "#first li").text
    table = browser.find_element(By.ID, "bench-table").get_attribute("textContent")
    assert "correlation" in table
    assert "0.7500" in table
    assert browser.get_log("browser") == []


def test_hostile_names_and_texts_stay_text(opened: Callable[..., Any], tmp_path: Path) -> None:
    name = "</script><img src=x onerror=document.title='broken'>"
    write_page(
        {
            name: (Source(name, made_up_trace(corpus_rows())), "entropy"),
            "b": (Source("b", made_up_trace(corpus_rows())), "margin"),
        },
        tmp_path / "hostile.html",
    )
    browser = opened(tmp_path / "hostile.html")
    assert name in browser.find_element(By.ID, "subtitle").text
    assert browser.title == "What speed costs and wins"
    assert not browser.find_elements(By.CSS_SELECTOR, "img")
    assert browser.get_log("browser") == []


def test_every_step_of_the_slider_is_a_speed(opened: Callable[..., Any]) -> None:
    slider = opened().find_element(By.ID, "speed")
    assert (float(slider.get_attribute("min")), float(slider.get_attribute("max"))) == (SPEEDS[0], SPEEDS[-1])
    assert float(slider.get_attribute("step")) == SPEEDS[1]
