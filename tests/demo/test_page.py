"""The page in a real browser: what is dropped is named as the networks name it, and what is none is said to be none."""

import base64
import re
import shutil
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from tests.demo.pairs import CLASSES, served, small_pair
from tests.pictures import read_cifar
from timm_deconv.data.pictures import read_picture
from timm_deconv.demo import DemoServer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DROP = """([name, type, content]) => {
    const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
    const carried = new DataTransfer();
    carried.items.add(new File([bytes], name, { type }));
    document.getElementById("drop").dispatchEvent(new DragEvent("drop", { dataTransfer: carried, bubbles: true }));
}"""
PLACES = """[...document.querySelectorAll("section, tr, figure, .frame, figcaption, footer")].map((each) => {
    const { x, y, width, height } = each.getBoundingClientRect();
    return [x, y + scrollY, width, height].map(Math.round);
})"""


@pytest.fixture(scope="module")
def server() -> Iterator[DemoServer]:
    with served(small_pair()) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine; apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright; pip install 'timm-deconv[test]'")
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, server: DemoServer, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page, opened; `page.faults` and `page.asked` collect what the console says and which addresses are asked."""
    width = getattr(request, "param", 1200)
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.faults, page.asked = [], []
    page.on("console", lambda message: page.faults.append(message.text))
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(server.url)
    page.wait_for_selector("main.ready")
    yield page
    page.close()


def drop(page: Any, name: str, kind: str, content: bytes) -> None:
    page.evaluate(DROP, [name, kind, base64.b64encode(content).decode()])


def shown(page: Any) -> None:
    page.wait_for_selector("#after:not([hidden])")


def test_a_dropped_picture_is_named_with_the_networks_own_probabilities(
    page: Any, server: DemoServer, data_dir: Path
) -> None:
    content = read_cifar(data_dir, 1)[3][1]
    drop(page, "cat.jpg", "image/jpeg", content)
    shown(page)
    found = server.pair.compare(read_picture(content))
    rows = page.locator("#classes tbody tr").all_inner_texts()
    assert len(rows) == 5
    for row in rows:
        name, twin, deconv = re.split(r"\s*[\t\n]\s*", row.strip())
        index = CLASSES.index(name)
        for text, share in ((twin, found.twin[index]), (deconv, found.deconv[index])):
            assert abs(float(text.strip("<% ")) - 100 * float(share)) < 0.1
    said = {CLASSES[int(each.argmax())] for each in (found.twin, found.deconv)}
    assert all(name in page.inner_text("#message") for name in said)
    assert page.faults == []
    assert {"about", "compare"} <= {url.removeprefix(server.url) for url in page.asked}
    assert all(url.startswith((server.url, "data:")) for url in page.asked)


def test_pictures_and_correlations_are_drawn(page: Any, data_dir: Path) -> None:
    drop(page, "cat.jpg", "image/jpeg", read_cifar(data_dir, 1)[3][1])
    shown(page)
    for name in ("picture", "seen", "whitened"):
        image = page.locator(f"#{name}")
        assert image.evaluate("(image) => image.naturalWidth") == 32
        assert image.get_attribute("alt").startswith("Your picture")
    colours = "(canvas) => [...canvas.getContext('2d').getImageData(0, 0, canvas.width, 1).data]"
    for name in ("before", "after"):
        canvas = page.locator(f"#{name}").evaluate(colours)
        assert len(canvas) == 4 * 27
        assert canvas[:4] == [0xB2, 0x18, 0x2B, 255], "a value correlates with itself"
        assert len({tuple(canvas[place : place + 3]) for place in range(0, len(canvas), 4)}) > 5
        assert re.search(r"on average 0\.\d\d", page.get_attribute(f"#{name}", "aria-label"))


def test_what_is_no_picture_is_said_and_the_next_one_is_taken_by_the_keyboard(page: Any, server: DemoServer) -> None:
    drop(page, "notes.txt", "text/plain", b"no picture at all")
    page.wait_for_selector("#message.wrong")
    assert page.inner_text("#message").startswith("The file is no picture; JPEG, PNG, ")
    assert page.locator("#after").is_hidden()
    page.evaluate("document.dispatchEvent(new DragEvent('drop', { dataTransfer: new DataTransfer() }))")
    assert page.inner_text("#message") == "That was no file. Drop a picture from your computer."
    asked = page.asked.count(f"{server.url}compare")
    page.evaluate("""() => {
        const carried = new DataTransfer();
        carried.items.add(new File([new Uint8Array(33 * 2 ** 20)], "vast.png"));
        document.dispatchEvent(new DragEvent("drop", { dataTransfer: carried }));
    }""")
    assert page.inner_text("#message") == "The file has more than 32 MB; make it smaller."
    assert page.asked.count(f"{server.url}compare") == asked
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "file"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    shown(page)
    assert page.locator("#message.wrong").count() == 0


def test_a_server_that_is_gone_is_said_to_be_gone(page: Any) -> None:
    page.route("**/compare", lambda route: route.abort())
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": b"a"})
    page.wait_for_selector("#message.wrong")
    assert page.inner_text("#message") == "The server does not answer. Is timm-deconv demo still running?"


@pytest.mark.parametrize("page", [1200, 390], indirect=True)
def test_nothing_moves_when_the_answer_comes_and_nothing_is_wider_than_the_window(page: Any) -> None:
    before = page.evaluate(PLACES)
    page.click("text=the cat")
    shown(page)
    assert page.evaluate(PLACES) == before
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_words_stand_out_from_their_ground_in_light_and_dark() -> None:
    style = (files("timm_deconv.demo") / "page" / "style.css").read_text()
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6});", part)) for part in style.split("@media", 2)[:2])
    assert light.keys() == dark.keys()
    for colours in (light, dark):
        for ink in ("ink", "faint", "accent", "twin", "deconv", "wrong"):
            for ground in ("page", "sheet", "quiet"):
                assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)


def contrast(first: str, second: str) -> float:
    """The contrast of two colours as WCAG 2 defines it."""
    light, dark = sorted(map(luminance, (first, second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    parts = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    linear = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
