"""The page as people see it: in Chromium, light and dark, on a desk and on a phone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from answers import profiled, pruned, report, sweep

from edgewise.optimizer.page.render import Answer, write_page

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

ANSWERS: dict[str, Answer] = {
    "optimize": report(),
    "prune": pruned(),
    "bench": sweep(),
    "profile": profiled("float", "int8"),
}
DESK, PHONE = (1100, 900), (390, 844)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking")

# What is in the page without anything to see: width, height and text of each part.
_BOXES = """(selector) => [...document.querySelectorAll(selector)].map(e => {
  const box = e.getBoundingClientRect();
  return {name: e.id || e.className.baseVal || e.tagName, width: box.width, height: box.height,
          text: e.textContent.trim().length};
})"""
# Elements of a drawing that reach out of it by more than a rounding, and are not cut off by a clip path.
_ESCAPED = """() => [...document.querySelectorAll("figure svg text")].filter(e => {
  const svg = e.closest("svg").getBoundingClientRect(), box = e.getBoundingClientRect();
  return svg.width > 0 && (box.left < svg.left - 12 || box.right > svg.right + 12);
}).map(e => e.textContent)"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        yield browser
        browser.close()


class Opened:
    """A page in the browser, what it asked for and what it complained of."""

    def __init__(self, browser: Any, path: Path, size: tuple[int, int], scheme: str, **options: Any) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        width, height = size
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, **options
        )
        self.page = self.context.new_page()
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(path.as_uri())

    def boxes(self, selector: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.page.evaluate(_BOXES, selector)
        return found


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    return {name: write_page(answer, folder / name) for name, answer in ANSWERS.items()}


@pytest.fixture(params=ANSWERS)
def path(request: pytest.FixtureRequest, paths: Mapping[str, Path]) -> Path:
    return paths[request.param]


@pytest.fixture
def optimized(paths: Mapping[str, Path]) -> Path:
    return paths["optimize"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_everything_is_there_to_be_seen(browser: Any, path: Path, size: tuple[int, int], scheme: str) -> None:
    opened = Opened(browser, path, size, scheme)
    opened.page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    sections, figures = opened.boxes("section"), opened.boxes("figure")
    assert len(sections) >= 4
    assert figures
    for part in (*sections, *figures):
        assert part["width"] > 200, part
        assert part["height"] > 60, part
        assert part["text"] > 20, part
    shown = "narrow" if size == PHONE else "wide"
    for drawing in opened.boxes(f"figure .{shown} svg"):
        assert drawing["width"] > 250
        assert drawing["height"] > 50
        assert drawing["text"] > 5
    assert opened.page.evaluate(_ESCAPED) == []
    assert opened.page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    assert opened.requests == [path.as_uri()]
    assert opened.complaints == []
    picture = path.parent / f"{scheme}-{size[0]}.png"
    opened.page.screenshot(path=picture, full_page=True)  # kept by pytest, to be looked at
    assert picture.stat().st_size > 20_000
    opened.context.close()


def test_dark_is_dark(browser: Any, optimized: Path) -> None:
    def paper(scheme: str) -> int:
        opened = Opened(browser, optimized, DESK, scheme)
        text = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
        opened.context.close()
        return sum(int(part) for part in text.removeprefix("rgb(").removesuffix(")").split(","))

    assert paper("light") == 3 * 255
    assert paper("dark") < 100


def test_a_drawing_takes_its_colours_from_the_page(browser: Any, optimized: Path) -> None:

    def ink(scheme: str) -> str:
        opened = Opened(browser, optimized, DESK, scheme)
        script = "getComputedStyle(document.querySelector('figure .wide svg text')).fill"
        fill: str = opened.page.evaluate(script)
        opened.context.close()
        return fill

    assert ink("light") != ink("dark")


def test_the_recipe_is_copied(browser: Any, optimized: Path) -> None:
    opened = Opened(browser, optimized, DESK, "light")
    button = opened.page.locator(".code button").last
    button.click()
    opened.page.wait_for_function(
        "[...document.querySelectorAll('button')].some(b => b.textContent === 'Copied')"
    )
    assert opened.complaints == []
    opened.context.close()


def test_complete_without_scripts(browser: Any, optimized: Path) -> None:
    opened = Opened(browser, optimized, PHONE, "light", java_script_enabled=False)
    assert opened.page.locator("figure .narrow svg").first.is_visible()
    assert not opened.page.locator(".code button").first.is_visible()  # it could do nothing
    assert opened.page.locator("pre").last.is_visible()
    opened.context.close()


def test_paper_holds_what_is_folded(browser: Any, optimized: Path) -> None:
    opened = Opened(browser, optimized, DESK, "light")
    opened.page.emulate_media(media="print")
    folded = opened.boxes("details .scroll")
    assert folded
    assert all(part["height"] > 0 for part in folded)
    assert not opened.page.locator("nav").is_visible()
    opened.context.close()
