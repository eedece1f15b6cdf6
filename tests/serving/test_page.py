"""The viewer page in headless Chromium: files, window, overlay, refusals, tokens, the worklist. Run by `make test-viewer`."""

from __future__ import annotations

import base64
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import uvicorn
from fake_engine import CARD, FakeEngine
from filled_tables import CLASSES, commit_run, entries, failure, prediction

from medvision_ray.config import DecodeConfig
from medvision_ray.config.serving import ServeJob
from medvision_ray.demo.archive import PhantomArchive
from medvision_ray.demo.encode import Subject, nifti
from medvision_ray.imaging.decode import decode
from medvision_ray.imaging.display import frame_scalings, show
from medvision_ray.imaging.errors import ErrorCode
from medvision_ray.imaging.image import Window
from medvision_ray.serving.app import create_app

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
TOKEN = "the-first-token-of-the-tests"
NEXT_TOKEN = "the-next-token-of-the-tests"
STAGE = "#stage"


class Site:
    """A running server.

    Attributes:
        app: its application; `app.state.token` can be changed while it runs.
    """

    def __init__(self, output: str | None = None, token: str | None = None) -> None:
        self.engine = FakeEngine()
        self.app = create_app(self.engine, ServeJob(bundles=("somewhere",), worklist=output), token)
        listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        self._server = uvicorn.Server(uvicorn.Config(self.app, log_level="critical", access_log=False))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian package chromium)")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, phantom: PhantomArchive) -> Iterator[Site]:
    output = str(tmp_path_factory.mktemp("tables"))
    chests = entries(sorted(Path(phantom.night_1).rglob("chest.dcm")))
    scored = [prediction(entry, CLASSES[i % 2], 0.55 + i / 20) for i, entry in enumerate(chests)]
    scored += [
        prediction({"image_id": i + 1, "uri": "", "etag": ""}, CLASSES[2], 0.4, modality="MR") for i in range(55)
    ]
    (broken,) = entries([Path(phantom.night_1) / "incoming" / "cut-off.dcm"])
    commit_run(output, "score-2", scored, [failure(broken, ErrorCode.TRUNCATED)])
    site = Site(output)
    yield site
    site.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open the page; at the end nothing may have gone wrong in it or have been asked of another server."""
    pages: list[tuple[Any, str, list[str], list[str]]] = []

    def visit(site: Site, **options: Any) -> Any:
        page = browser.new_page(viewport={"width": 1280, "height": 800}, **options)
        errors: list[str] = []
        asked: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda line: errors.append(line.text) if "Content Security Policy" in line.text else None)
        page.on("request", lambda request: asked.append(request.url))
        pages.append((page, site.address, errors, asked))
        page.goto(site.address)
        return page

    yield visit
    for page, address, errors, asked in pages:
        page.close()
        assert errors == []
        assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


def upload(page: Any, *files: Path) -> None:
    page.set_input_files("#file-input", [str(file) for file in files])
    page.wait_for_selector("#result .bars", timeout=30_000)


def await_text(page: Any, selector: str, text: str | re.Pattern[str] | None = None, but: str | None = None) -> None:
    """Wait until an element holds a text, or another one. (The page's policy forbids what `wait_for_function` does.)"""
    page.locator(selector).filter(has_text=text, has_not_text=but).wait_for(state="visible")


def painted(page: Any) -> np.ndarray:
    """The picture on the stage, pixel by pixel, at one to one and without the mask: shape `(rows, columns, 3)`."""
    page.keyboard.press("m")
    page.keyboard.press("o")
    page.wait_for_timeout(200)
    picture = page.evaluate("document.getElementById('stage').toDataURL('image/png').split(',')[1]")
    page.keyboard.press("m")
    page.keyboard.press("f")
    found = cv2.imdecode(np.frombuffer(base64.b64decode(picture), np.uint8), cv2.IMREAD_UNCHANGED)
    return np.asarray(found)[..., 2::-1]


def middle(canvas: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The part of the stage where a centred picture lies."""
    top, left = (canvas.shape[0] - rows + 1) // 2, (canvas.shape[1] - columns + 1) // 2
    return canvas[top : top + rows, left : left + columns]


def expected(path: Path, window: Window | None = None) -> np.ndarray:
    """The first frame by the display chain of scoring, as 8 bits."""
    image = decode(path.read_bytes(), DecodeConfig())
    scaling = next(iter(frame_scalings(image, True, (0.5, 99.5), window)))
    grey = show(image.pixels[0], image.display_of(0), scaling)
    return ((grey.astype(np.uint32) + 128) // 257).astype(np.uint8)


def test_a_ct_is_shown_as_scoring_sees_it_also_in_another_window(
    visit: Callable[..., Any], site: Site, phantom: PhantomArchive
) -> None:
    path = next(Path(phantom.night_1).rglob("chest.dcm"))
    page = visit(site)
    upload(page, path)
    picture = middle(painted(page), 256, 256)
    np.testing.assert_array_equal(picture[..., 1], expected(path))
    page.keyboard.press("2")  # lung
    assert page.input_value("#center") == "-600"
    np.testing.assert_array_equal(middle(painted(page), 256, 256)[..., 0], expected(path, Window(-600.0, 1500.0)))
    assert "HU" in page.inner_text("#corner-bl")


@pytest.mark.parametrize("name", ["film-1.dcm", "capture.png", "head.nii.gz"])
def test_each_format_is_opened_and_scored(
    visit: Callable[..., Any], site: Site, phantom: PhantomArchive, name: str
) -> None:
    page = visit(site)
    upload(page, Path(phantom.night_1) / "case-000" / name)
    assert page.inner_text("#result .label") == "consolidation"
    assert page.inner_text("#result .bar.positive .number") == "0.76"
    assert page.locator("#result .track .tick").count() == 3
    assert "consolidation: 0.76, over the operating point" in (
        page.get_attribute("#result .bar.positive", "aria-label") or ""
    )
    assert middle_is_drawn(page)
    assert site.engine.asked[-1].model is not None


def middle_is_drawn(page: Any) -> bool:
    canvas = painted(page)
    height, width = canvas.shape[:2]
    return bool(np.ptp(canvas[height // 4 : -height // 4, width // 4 : -width // 4]) > 50)


def test_a_jpeg_of_a_real_patient_group(visit: Callable[..., Any], site: Site, data_dir: Path) -> None:
    path = next(iter(sorted((data_dir / "chest_xray").rglob("*.jp*g"))))
    page = visit(site)
    upload(page, path)
    image = decode(path.read_bytes(), DecodeConfig())
    np.testing.assert_array_equal(middle(painted(page), *image.shape)[..., 0], image.pixels[0])


def test_window_by_mouse_and_back(visit: Callable[..., Any], site: Site, phantom: PhantomArchive) -> None:
    page = visit(site)
    upload(page, next(Path(phantom.night_1).rglob("chest.dcm")))
    before = painted(page)
    page.mouse.move(400, 400)
    page.mouse.down()
    page.mouse.move(460, 360, steps=4)
    page.mouse.up()
    center, width = (float(page.get_attribute(STAGE, f"data-{name}")) for name in ("center", "width"))
    assert center < 40
    assert width > 400
    assert page.input_value("#preset") == "custom"
    assert (painted(page) != before).any()
    page.keyboard.press("r")
    assert page.input_value("#preset") == "file"
    np.testing.assert_array_equal(painted(page), before)


def test_zoom_and_pan_by_mouse(visit: Callable[..., Any], site: Site, phantom: PhantomArchive) -> None:
    page = visit(site)
    upload(page, next(Path(phantom.night_1).rglob("chest.dcm")))
    fitted = page.inner_text("#corner-bl")
    page.mouse.move(400, 400)
    page.mouse.wheel(0, -300)
    await_text(page, "#corner-bl", but=fitted)
    still = page.screenshot(clip={"x": 100, "y": 150, "width": 500, "height": 400})
    page.keyboard.down("Shift")
    page.mouse.down()
    page.mouse.move(450, 430)
    page.mouse.up()
    page.keyboard.up("Shift")
    page.wait_for_timeout(100)
    assert page.screenshot(clip={"x": 100, "y": 150, "width": 500, "height": 400}) != still
    page.mouse.dblclick(400, 400)
    assert page.inner_text("#corner-bl") == fitted


def test_mask_and_explanation_are_laid_over_and_taken_off(
    visit: Callable[..., Any], site: Site, phantom: PhantomArchive
) -> None:
    page = visit(site)
    upload(page, next(Path(phantom.night_1).rglob("chest.dcm")))
    clip = {"x": 100, "y": 150, "width": 700, "height": 500}

    def look() -> bytes:
        page.wait_for_timeout(150)
        return bytes(page.screenshot(clip=clip))

    with_mask = look()
    page.click("#mask")
    plain = look()
    assert page.get_attribute("#mask", "aria-pressed") == "false"
    assert plain != with_mask
    page.click("#heat")
    page.wait_for_selector(f'{STAGE}[data-heat="on"]')
    assert look() != plain
    page.click("#heat")
    page.wait_for_selector(f'{STAGE}[data-heat="off"]')
    page.click("#mask")
    page.mouse.move(0, 0)
    assert look() == with_mask
    page.locator("#mask-opacity").fill("80")
    assert look() != with_mask


def test_a_volume_opens_at_its_key_frame_and_scrolls(visit: Callable[..., Any], site: Site, tmp_path: Path) -> None:
    volume = np.random.default_rng(0).random((7, 64, 64), np.float32)
    (tmp_path / "v.nii.gz").write_bytes(nifti(Subject("A^B", "1", "2", 1, seed=0), volume))
    page = visit(site)
    upload(page, tmp_path / "v.nii.gz")
    page.wait_for_selector(f'{STAGE}[data-position="3"]')
    page.focus(STAGE)
    page.keyboard.press("ArrowDown")
    assert page.inner_text("#slice-number") == "5 / 7"
    page.keyboard.press("End")
    page.keyboard.press("ArrowDown")
    assert page.inner_text("#slice-number") == "7 / 7"
    page.mouse.move(400, 400)
    page.mouse.wheel(0, -120)
    await_text(page, "#slice-number", but="7 / 7")
    page.locator("#slice").fill("1")
    assert page.inner_text("#corner-tr") == "1 / 7"
    assert page.inner_text("#edge-left") == "R"


def test_a_folder_is_sorted_into_series_and_files_without_their_names(
    visit: Callable[..., Any], site: Site, tmp_path: Path, phantom_series: Callable[..., list[bytes]]
) -> None:
    for number, data in enumerate(phantom_series(4)):
        (tmp_path / f"DOE^JANE {9 - number}.dcm").write_bytes(data)
    (tmp_path / "other.dcm").write_bytes(phantom_series(1, series=1)[0])
    (tmp_path / "notes.txt").write_text("no image")
    page = visit(site)
    upload(page, *sorted(tmp_path.iterdir()))
    page.wait_for_selector(".files .item >> nth=2")
    titles = page.locator(".files .title").all_inner_texts()
    assert sorted(title.split()[0] for title in titles) == ["File", "File", "Series"]
    assert "unsupported_format" in page.inner_text(".files .bad")
    assert "DOE" not in page.content()
    page.click('.files .item:has-text("Series 1")')
    page.wait_for_selector(f'{STAGE}[data-position="2"]')
    assert page.inner_text("#slice-number") == "3 / 4"
    page.check("#names")
    assert "DOE^JANE" in page.inner_text(".files")


def test_what_cannot_be_decoded_says_why(visit: Callable[..., Any], site: Site, phantom: PhantomArchive) -> None:
    page = visit(site)
    page.set_input_files("#file-input", str(Path(phantom.night_1) / "incoming" / "cut-off.dcm"))
    page.wait_for_selector('.refusal[role="alert"]')
    assert "The object ends before its pixels do." in page.inner_text("#message")
    assert page.inner_text("#message code") == "truncated"
    upload(page, next(Path(phantom.night_1).rglob("chest.dcm")))
    assert page.inner_text("#message") == ""


def test_a_dropped_file_is_opened(visit: Callable[..., Any], site: Site, phantom: PhantomArchive) -> None:
    data = next(Path(phantom.night_1).rglob("capture.png")).read_bytes()
    page = visit(site)
    page.evaluate(
        """(bytes) => {
          const data = new DataTransfer();
          data.items.add(new File([new Uint8Array(bytes)], "x.png"));
          for (const kind of ["dragenter", "dragover", "drop"])
            document.getElementById("drop").dispatchEvent(new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true}));
        }""",
        list(data),
    )
    page.wait_for_selector("#result .bars")


def test_a_token_is_asked_for_and_asked_for_again_when_it_has_expired(
    visit: Callable[..., Any], phantom: PhantomArchive
) -> None:
    site = Site(token=TOKEN)
    page = visit(site)
    page.wait_for_selector("#token-dialog[open]")
    page.fill("#token", TOKEN)
    page.keyboard.press("Enter")
    page.wait_for_selector("#token-dialog", state="hidden")
    path = next(Path(phantom.night_1).rglob("chest.dcm"))
    upload(page, path)
    site.app.state.token = NEXT_TOKEN
    page.set_input_files("#file-input", str(path))
    page.wait_for_selector("#token-dialog[open]")
    assert "refused" in page.inner_text("#token-reason")
    page.fill("#token", NEXT_TOKEN)
    page.click("#token-form .primary")
    page.wait_for_selector("#result .bars")
    assert page.evaluate("[localStorage.length, sessionStorage.length]") == [0, 1]
    site.app.state.token = "yet another one, not given"
    page.set_input_files("#file-input", str(path))
    page.wait_for_selector("#token-dialog[open]")
    page.click("#token-cancel")
    page.wait_for_selector(".refusal")
    assert page.inner_text("#message code") == "unauthorized"
    site.close()


def test_the_worklist_is_filtered_paged_and_opened(visit: Callable[..., Any], site: Site) -> None:
    page = visit(site)
    page.click("#tab-worklist")
    page.wait_for_selector("#worklist tbody tr")
    assert page.locator("#worklist tbody tr").count() == 50
    page.click(".pager >> text=Next")
    await_text(page, ".pager span", "51–")
    page.select_option("#filter-label", "cavity")
    page.fill("#filter-min_probability", "0.6")
    page.press("#filter-min_probability", "Enter")
    page.select_option("#filter-order", "uncertain")
    await_text(page, ".pager span", re.compile("^1–"))
    page.wait_for_selector("#worklist tbody tr:first-child >> text=0.65")
    results = page.locator("#worklist tbody td.strong").all_inner_texts()
    assert set(results) == {"cavity"}
    page.focus("#worklist tbody tr:first-child .rowlink")
    page.keyboard.press("Enter")
    page.wait_for_selector(f'{STAGE}[data-position="0"]')
    assert page.inner_text("#result .label") == "cavity"
    assert page.inner_text("#row .whole").isdigit()
    assert page.is_disabled("#heat")
    assert middle_is_drawn(page)
    first = page.inner_text("#row .whole")
    page.keyboard.press("j")
    await_text(page, "#row .whole", but=first)


def test_failures_are_listed_and_opened(visit: Callable[..., Any], site: Site) -> None:
    page = visit(site)
    page.click("#tab-worklist")
    page.click("text=Failures")
    page.wait_for_selector("#worklist tbody tr >> text=truncated")
    page.click("#worklist tbody tr")
    page.wait_for_selector(".refusal")
    assert "ends before its pixels" in page.inner_text("#result .problem")
    assert page.inner_text("#message code") == "truncated"


def test_an_image_that_is_gone_says_so_beside_its_row(visit: Callable[..., Any], site: Site) -> None:
    page = visit(site)
    page.click("#tab-worklist")
    page.wait_for_selector("#worklist tbody tr")
    page.select_option("#filter-modality", "MR")
    page.click("#worklist tbody tr:first-child")
    page.wait_for_selector(".refusal")
    assert page.inner_text("#result .label") == "pleural effusion"


def test_a_server_without_tables_says_so(visit: Callable[..., Any]) -> None:
    site = Site()
    page = visit(site)
    page.click("#tab-worklist")
    page.wait_for_selector("#worklist .empty h2")
    assert "without the output" in page.inner_text("#worklist")
    site.close()


def test_the_card_is_text_and_never_markup(visit: Callable[..., Any], site: Site) -> None:
    page = visit(site)
    page.wait_for_selector("#model option[value^=phantom]", state="attached")
    page.click("#card-open")
    page.wait_for_selector("#card h1")
    assert "<b>128</b>" in CARD
    assert "<b>128</b>" in page.inner_text("#card li")
    assert page.inner_text("#card pre") == "accuracy: 0.9"
    page.keyboard.press("Escape")
    page.wait_for_selector("#card-dialog", state="hidden")


def test_light_and_dark_follow_the_system_until_somebody_chooses(visit: Callable[..., Any], site: Site) -> None:
    page = visit(site, color_scheme="light")
    theme = "document.documentElement.dataset.theme"
    assert page.evaluate(theme) == "light"
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"{theme} === 'dark'")  # the browser tells the page in its own time
    page.click("#theme")
    page.reload()
    assert page.evaluate(theme) == "light"


def test_every_control_has_a_name_and_the_notice_is_always_there(visit: Callable[..., Any], site: Site) -> None:
    page = visit(site)
    for tab in ("#tab-view", "#tab-worklist"):
        page.click(tab)
        page.wait_for_timeout(300)
        assert page.is_visible("text=Not a medical device.")
        nameless = page.evaluate(
            """() => [...document.querySelectorAll("button, input:not([hidden]), select, canvas")].filter((one) =>
              !(one.getAttribute("aria-label") || one.labels?.length || one.textContent.trim())).map((one) => one.outerHTML)"""
        )
        assert nameless == []


def test_keys_do_nothing_while_somebody_types(visit: Callable[..., Any], site: Site, phantom: PhantomArchive) -> None:
    page = visit(site)
    upload(page, next(Path(phantom.night_1).rglob("chest.dcm")))
    page.fill("#center", "55")
    page.keyboard.press("Enter")
    assert page.get_attribute(STAGE, "data-center") == "55"
    page.keyboard.press("m")
    assert page.get_attribute("#mask", "aria-pressed") == "true"


def test_a_narrow_window_has_no_sideways_scroll(visit: Callable[..., Any], site: Site, phantom: PhantomArchive) -> None:
    page = visit(site)
    page.set_viewport_size({"width": 400, "height": 800})
    upload(page, next(Path(phantom.night_1).rglob("chest.dcm")))
    for tab in ("#tab-view", "#tab-worklist"):
        page.click(tab)
        page.wait_for_timeout(400)
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
