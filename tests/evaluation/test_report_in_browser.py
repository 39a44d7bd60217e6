"""The report opened from disk in a real browser, where there is one: no request leaves it, the slider moves."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.evaluation.reported import evaluation, jpeg
from vae.evaluation.report.page import render

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,900",
)
HOSTILE = [
    "<script>window.harmed=1</script>",
    "<img src=x onerror=window.harmed=1>",
    '"><svg onload=window.harmed=1>',
    "' onmouseover='window.harmed=1' x='",
    "</script><script>window.harmed=1</script>",
    "</style><style>*{display:none}</style>",
    "{{ 7 * 7 }}{% raw %}",
    "javascript:window.harmed=1",
    "photo\u202egpj.exe\u2066",
    "two\nlines\r\n\tand\x00nothing",
    "half \udcff\ud800 characters",
    "n" * 4000,
    "../../../etc/passwd%00.png",
    "<!--",
    "&lt;b&gt;\u2028\u2029]]>${window.harmed=1}`",
]

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def opened(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A report in which every image, both models and the data set have hostile names."""
    generator = torch.Generator().manual_seed(0)
    images = {name: torch.randint(0, 256, (3, 64, 64), generator=generator, dtype=torch.uint8) for name in HOSTILE}
    models = {HOSTILE[0]: jpeg, HOSTILE[2]: lambda image: image // 2}
    document, rows, pictures = evaluation(images, models, dataset=HOSTILE[4])
    document["missing"]["lpips_vgg"] = HOSTILE[1]
    document["datasets"][HOSTILE[4]]["left_out"] = [{"image": name, "reason": name} for name in HOSTILE]
    page = tmp_path_factory.mktemp("report") / "report.html"
    page.write_text(render(document, rows, pictures), encoding="utf-8")
    browser.get(page.as_uri())
    return page


def _requested(browser: Any, page: Path) -> list[str]:
    """Addresses that the page asked for since this was last called; the browser's own pages ask for others."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [one["params"] for one in messages if one["method"] == "Network.requestWillBeSent"]
    return [one["request"]["url"] for one in sent if one["documentURL"] == page.as_uri()]


def test_no_request_leaves_the_page_and_nothing_is_refused(browser: Any, opened: Path):
    sent = _requested(browser, opened)
    assert opened.as_uri() in sent
    assert [url for url in sent if not url.startswith("data:") and url != opened.as_uri()] == []
    assert browser.get_log("browser") == []


def test_a_request_would_have_been_seen(browser: Any, opened: Path, tmp_path: Path):
    open_page = opened.read_text(encoding="utf-8").replace("Content-Security-Policy", "none")
    (tmp_path / "report.html").write_text(open_page.replace("</body>", '<img src="http://127.0.0.1:9/a.png"></body>'))
    browser.get((tmp_path / "report.html").as_uri())
    assert "http://127.0.0.1:9/a.png" in _requested(browser, tmp_path / "report.html")
    browser.get_log("browser")
    browser.get(opened.as_uri())


def test_hostile_names_are_text(browser: Any, opened: Path):
    run = browser.execute_script
    assert run("return window.harmed") is None
    assert run("return document.scripts.length") == 2
    assert run("return document.querySelectorAll('style').length") == 1
    assert run("return document.querySelectorAll('[onerror], [onload], [onmouseover]').length") == 0
    assert run("return [...document.images].every(image => image.src.startsWith('data:'))")
    text = run("return document.body.textContent")
    for number in (0, 1, 2, 4, 5, 6, 13):
        assert HOSTILE[number] in text
    assert "photo\\u202egpj.exe" in text
    assert "half \\udcff\\ud800 characters" in text
    assert not set("\u202e\u2066\x00\u2028") & set(text)
    assert run("return document.documentElement.scrollWidth <= window.innerWidth")


def test_the_slider_moves_by_keyboard_and_shows_what_is_chosen(browser: Any, opened: Path):
    by = pytest.importorskip("selenium.webdriver.common.by").By
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    slider = browser.find_element(by.ID, "divider")
    clip = "return getComputedStyle(document.querySelector('.over')).clipPath"
    before = browser.execute_script(clip)
    slider.send_keys(keys.ARROW_RIGHT * 10)
    assert browser.execute_script(clip) != before
    image = "return document.getElementById('right-image').src"
    first = browser.execute_script(image)
    browser.execute_script(
        "const r = document.getElementById('right'); r.value = 2; r.dispatchEvent(new Event('change'))"
    )
    assert browser.execute_script(image) != first
    assert browser.find_element(by.ID, "right-tag").text.endswith("error")
    browser.find_element(by.ID, "next").send_keys(keys.ENTER)  # a click may come while the page still scrolls
    assert browser.find_element(by.ID, "right-tag").text.endswith("error")
    assert browser.execute_script("return document.querySelectorAll('.strip [aria-current=true]').length") == 1
    assert browser.execute_script("return document.getElementById('right-image').naturalWidth") == 64


def test_a_phone_shows_it_without_scrolling_sideways(browser: Any, opened: Path):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    )
    assert browser.execute_script("return document.documentElement.scrollWidth") == 390
