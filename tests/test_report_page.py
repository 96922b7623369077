"""The page of ``hybridfl report`` in a real browser: what is drawn, what the controls do, and that it asks nobody for anything."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, programs
from cli_helpers import SMALL_DATA, SMALL_WORK, call, done
from compare_helpers import Outputs

TABS = [
    "Results",
    "Curves",
    "Claims",
    "By domain",
    "Forgetting",
    "Clients",
    "Coefficients",
    "Split",
    "Configs and runs",
]
PRESET = """\
# @package _global_
# One claim (no paper)
claims: [{id: own, text: Feddle is better., better: feddle, than: fedavg}]
"""
TWO_DOMAINS = (
    *(
        "dataset=domains",
        "+dataset@dataset.sets.more=digits",
        "dataset.size=8",
        "dataset.channels=1",
        "dataset.limit=60",
    ),
    "partitioning=domains",
)
CURVES = ".legend button"
PANEL = "[role=tabpanel]:not([hidden])"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = programs()
    if found is None:
        problem = "chromium and chromedriver are not installed (Debian: apt install chromium chromium-driver)"
        if os.environ.get("CI"):
            pytest.fail(problem)
        pytest.skip(problem)
    opened = Browser(*found)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of real runs that have something for every section."""
    folder = tmp_path_factory.mktemp("report")
    conf = folder / "conf"
    (conf / "experiment").mkdir(parents=True)
    (conf / "experiment" / "study.yaml").write_text(PRESET)
    line = ("-m", "--config-dir", str(conf), "experiment=study", *SMALL_WORK, f"output_dir={folder}")
    done(*line, *SMALL_DATA, "baseline=none,fedavg", "seed=0,1", "clients.noisy_labels=0,0.4")
    done(*line, *SMALL_DATA, "baseline=fedavg", "seed=0", "tasks.number=2")
    done(*line, *TWO_DOMAINS, "baseline=fedavg", "seed=0")
    answer = call("report", str(folder), "--out", str(folder / "report.html"), "--config-dir", str(conf))
    assert answer.status == 0, answer.both
    return folder / "report.html"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """Of a run whose method, setting and title are markup."""
    outputs = Outputs(tmp_path / "outputs")
    evil = "</script><script>window.taken=1</script><img src=x onerror='window.taken=1'>{{style}}"
    for place, name in enumerate((evil, "fedavg")):
        outputs.run(f"a{place}", name, 1, [0.1, 0.5], partitioning__name=evil if place else "plain")
    file = tmp_path / "hostile.html"
    assert call("report", str(outputs.path), "--out", str(file), "--title", evil).status == 0
    return file


def drawn_well(browser: Browser, page: Path) -> None:
    """No complaint on the console, and no request but for the file itself."""
    assert browser.log("browser") == []
    assert {asked.partition("#")[0] for asked in browser.requests()} <= {page.resolve().as_uri(), "data:,"}
    assert browser.run("return performance.getEntriesByType('resource').map((e) => e.name)") == []


def test_every_section_is_drawn_without_request_or_complaint(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.texts("[role=tab]") == TABS
    assert browser.texts("h2") == ["Results"]
    for place, name in enumerate(TABS, 1):
        browser.click(f"[role=tab]:nth-child({place})")
        assert browser.texts("h2") == [name]
        assert browser.texts("[role=tab][aria-selected=true]") == [name]
        assert browser.texts(f"{PANEL} :is(svg.chart, svg.map, table)"), name
    drawn_well(browser, page)


def test_nothing_can_be_asked_for(browser: Browser, page: Path) -> None:
    """The page's own rule stops a request that a later version might try."""
    browser.open(page)
    script = """
        const image = new Image();
        image.src = "http://127.0.0.1:9/picture.png";
        return fetch("http://127.0.0.1:9/").then(() => "answered", () => "refused");
    """
    assert browser.run(script) == "refused"
    assert any("Content Security Policy" in entry["message"] for entry in browser.log("browser"))


def test_the_filter_leaves_matching_rows_in_tables_and_curves(browser: Browser, page: Path) -> None:
    browser.open(page)
    both = browser.texts("tbody th")
    assert {text.split()[0] for text in both} == {"feddle", "fedavg"}
    browser.click("#filter")
    browser.press("feddle")
    assert set(browser.texts("tbody th")) == {"feddle"}
    assert browser.texts("#matches") == ["2 of 6 rows match the filter."]
    browser.click("[role=tab]:nth-child(2)")
    assert browser.texts(CURVES) == ["feddle"]
    assert len(browser.texts(f"{PANEL} svg.chart")) == 2
    browser.click("#filter")
    browser.press(" -noisy_labels=0.4")
    assert len(browser.texts(f"{PANEL} svg.chart")) == 1
    assert "noisy_labels=0" in browser.texts(f"{PANEL} figcaption")[0].split()
    browser.press(" nothing")
    assert browser.texts(f"{PANEL} .empty") == ["None of the rows that match the filter has this curve."]
    drawn_well(browser, page)


def test_columns_sort_and_say_so(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.click(f"{PANEL} .segments label:last-of-type")
    column = f"{PANEL} thead th:nth-child(%d) button"
    heads = browser.texts(f"{PANEL} thead th")
    place = heads.index("accuracy global") + 1
    cells = f"{PANEL} tbody tr > :nth-child({place})"
    before = [float(text.split()[0]) for text in browser.texts(cells)]
    browser.click(column % place)
    assert [float(text.split()[0]) for text in browser.texts(cells)] == sorted(before, reverse=True)
    assert browser.texts("th[aria-sort=descending]") == ["accuracy global"]
    browser.click(column % place)
    assert [float(text.split()[0]) for text in browser.texts(cells)] == sorted(before)
    browser.click(column % 1)
    names = browser.texts(f"{PANEL} tbody tr > :nth-child(1)")
    assert names == sorted(names)
    assert browser.texts("th[aria-sort]") == ["method"]


def test_the_difference_drawn_is_the_difference_written(browser: Browser, page: Path) -> None:
    """The dot stands left of the line for less than the reference, right for more."""
    browser.open(page)
    browser.click(f"{PANEL} .segments label:last-of-type")
    script = """
        return [...document.querySelectorAll("svg.interval")].map((drawing) => [drawing.getAttribute("aria-label"),
          Number(drawing.querySelector("circle").getAttribute("cx")) - Number(drawing.querySelector(".zero").getAttribute("x1"))]);
    """
    drawn = browser.run(script)
    assert len(drawn) == 2
    for text, right in drawn:
        assert text[0] == ("+" if right > 0 else "-")


def test_curves_against_rounds_bytes_and_seconds(browser: Browser, page: Path) -> None:
    browser.open(page, "#curves")
    assert set(browser.texts("svg text.name")) == {"round", "accuracy %, global"}
    lines = "return [...document.querySelectorAll('path.line')].map((line) => line.getAttribute('d'))"
    ticks = "svg.chart text:not(.name)"
    first = browser.texts(ticks)
    assert {"1", "2", "3", "4"} <= set(first)
    for place, name in ((2, "MB sent"), (3, "seconds")):
        browser.click(f"{PANEL} .segments label:nth-of-type({place})")
        assert set(browser.texts("svg text.name")) == {name, "accuracy %, global"}
        assert browser.run("return document.activeElement.parentElement.textContent") == name
        assert browser.texts(ticks) != first
    drawings = len(browser.run(lines))
    browser.click(CURVES)
    assert len(browser.run(lines)) < drawings
    assert browser.run("return document.activeElement.getAttribute('aria-pressed')") == "false"
    drawn_well(browser, page)


def test_the_keyboard_reaches_tabs_and_points(browser: Browser, page: Path) -> None:
    right, end, home = "\ue014", "\ue010", "\ue011"
    browser.open(page)
    browser.click("[role=tab]")
    browser.press(right)
    assert browser.texts("[role=tab][aria-selected=true]") == ["Curves"]
    browser.run("document.querySelector('svg.chart').focus()")
    browser.press(right)
    assert browser.texts(".tip b")[0] == "round 1"
    browser.press(right)
    assert browser.texts(".tip b")[0] == "round 2"
    browser.run("document.querySelector('[role=tab][aria-selected=true]').focus()")
    browser.press(end)
    assert browser.texts("h2") == [TABS[-1]]
    browser.press(right)
    assert browser.texts("h2") == [TABS[0]]
    browser.press(end + home)
    assert browser.texts("h2") == [TABS[0]]


def test_what_is_needed_to_read_it_aloud(browser: Browser, page: Path) -> None:
    browser.open(page)
    for place in range(1, len(TABS) + 1):
        browser.click(f"[role=tab]:nth-child({place})")
        browser.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        browser.run("return new Promise((done) => { setTimeout(done, 30); })")
    nameless = """
        const all = (selector) => [...document.querySelectorAll(selector)];
        return [
          ...all("table").filter((one) => !one.caption?.textContent || !one.querySelector("thead th[scope=col]")),
          ...all("svg").filter((one) => one.getAttribute("role") !== "img" || !one.getAttribute("aria-label")),
          ...all("select, input").filter((one) => !one.labels.length),
          ...all("[role=tab]").filter((one) => document.getElementById(one.getAttribute("aria-controls"))?.role !== "tabpanel"),
          ...all("[role=tabpanel]").filter((one) => document.getElementById(one.getAttribute("aria-labelledby"))?.role !== "tab"),
        ].map((one) => one.outerHTML.slice(0, 200));
    """
    assert browser.run(nameless) == []
    ids = browser.run("return [...document.querySelectorAll('[id]')].map((one) => one.id)")
    assert len(ids) == len(set(ids))
    assert len(browser.run("return [...document.querySelectorAll('.map + .tip')]")) >= 2


def test_names_are_never_markup(browser: Browser, hostile: Path) -> None:
    browser.open(hostile)
    for place in range(1, len(browser.texts("[role=tab]")) + 1):
        browser.click(f"[role=tab]:nth-child({place})")
        assert browser.run("return document.querySelectorAll('main img, main script, h1 *').length") == 0
    assert browser.run("return window.taken ?? null") is None
    assert browser.texts("h1")[0].startswith("</script><script>window.taken=1</script><img src=x")
    assert browser.run("return document.title") == browser.texts("h1")[0]
    assert any("<img src=x onerror='window.taken=1'>{{style}}" in text for text in browser.texts("th, td"))
    drawn_well(browser, hostile)


def test_dark_light_and_printed(browser: Browser, page: Path) -> None:
    browser.open(page)
    shade = "return getComputedStyle(document.body).backgroundColor"
    browser.click("#theme")
    light = browser.run(shade)
    browser.click("#theme")
    dark = browser.run(shade)
    brightness = [sum(map(int, text[4:-1].split(","))) for text in (light, dark)]
    assert brightness[0] > 600 > 150 > brightness[1]
    count = (
        "return [...document.querySelectorAll('[role=tabpanel] .content')].filter((one) => one.children.length).length"
    )
    assert browser.run(count) == 1
    assert len(browser.print()) > 50_000
    assert browser.run(count) == len(TABS)
    drawn_well(browser, page)


def test_a_link_opens_a_section(browser: Browser, page: Path) -> None:
    browser.open(page, "#splits")
    assert browser.texts("h2") == ["Split"]
    assert browser.run("return scrollY") == 0
    browser.run("location.hash = '#claims'")
    assert browser.texts("h2") == ["Claims"]
    browser.open(page, "#nowhere")
    assert browser.texts("h2") == ["Results"]
