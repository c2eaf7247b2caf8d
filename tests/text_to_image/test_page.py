"""The page: what it draws, what it says, and what it keeps to itself."""

import importlib.util
import json
import shutil
import urllib.request

import pytest

gr = pytest.importorskip("gradio", reason="needs gradio (optional)")
pytest.importorskip("diffusers", reason="needs requirements-extra.txt (diffusers)")
pytest.importorskip("transformers", reason="needs requirements-extra.txt (transformers)")
pytest.importorskip("peft", reason="needs requirements-extra.txt (peft)")

from common.cli import parse  # noqa: E402
from text_to_image.generate import Settings, main  # noqa: E402
from text_to_image.page import build_page, open_page  # noqa: E402

FLAGS = ["--ui", "--tiny", "--device", "cpu", "--prompt", "a jay", "--total-substeps", "8"]


def call(page, name: str, *values):
    (function,) = (f for f in page.fns.values() if f.api_name == name)
    return function.fn(*values)


def test_drawing_on_the_page(tmp_path, capsys):
    page = build_page(parse(Settings, "", [*FLAGS, "--height", "64", "--width", "48"]))
    values = ["a jay", "gm-qwen", 4, 0, 3, 2, 48, 64]
    pictures, status = call(page, "draw", *values)
    assert pictures.count("<img") == 2 and "seed 4" in pictures
    assert "2 images" in status and "network" in status
    assert "trained for 4" in call(page, "draw", "a jay", "gm-qwen", 3, 0, 3, 1, 48, 64)[1]
    for bad, message in ((["", *values[1:]], "none may be empty"),
                         ([*values[:6], 8, 8], "height 8, width 8"),
                         ([*values[:4], -1, *values[5:]], "seed -1"),
                         ([*values[:4], None, *values[5:]], "NoneType")):  # fmt: skip
        with pytest.raises(gr.Error, match=message):
            call(page, "draw", *bad)
    assert str(tmp_path) not in pictures + status


def test_errors_of_loading_go_to_the_terminal(tmp_path, capsys):
    """They name local files, which a page that others may see does not show."""
    page = build_page(parse(Settings, "", [*FLAGS, "--adapter", str(tmp_path)]))
    with pytest.raises(gr.Error) as error:
        call(page, "draw", "a jay", "gm-qwen", 4, 0, 3, 1, 64, 64)
    assert "gm-qwen could not be loaded" in str(error.value)
    assert str(tmp_path) not in str(error.value) and str(tmp_path) in capsys.readouterr().err
    assert str(tmp_path) not in json.dumps(page.get_config_file(), default=str)


def test_the_page_listens_on_the_loopback_address_unless_told_otherwise(monkeypatch):
    """Also where the environment says otherwise."""
    given = []
    monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
    monkeypatch.setenv("GRADIO_SHARE", "True")
    monkeypatch.setattr(gr.Blocks, "block_thread", lambda self: given.append(self))
    open_page(parse(Settings, "", [*FLAGS, "--port", str(free_port())]))
    (page,) = given
    try:
        assert page.server_name == "127.0.0.1" and not page.share
        with urllib.request.urlopen(f"http://127.0.0.1:{page.server_port}/config") as reply:
            text = reply.read().decode()
        assert "Network evaluations" in text
    finally:
        page.close()
    launched = {}
    monkeypatch.setattr(gr.Blocks, "launch", lambda self, **o: launched.update(o) or (0, "", 0))
    open_page(parse(Settings, "", [*FLAGS, "--host", "0.0.0.0"]))
    assert launched["server_name"] == "0.0.0.0" and launched["share"] is False


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_missing_gradio_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != "gradio" or None)
    with pytest.raises(ImportError, match="--ui needs the package 'gradio': pip install gradio"):
        main(["--ui", "--tiny"])


@pytest.mark.slow
def test_page_in_a_browser(tmp_path):
    """The page with tiny models, in headless Chromium: draw, read the pictures, see an error."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromium-driver")
    from selenium.webdriver.support.ui import WebDriverWait

    page = build_page(parse(Settings, "", [*FLAGS, "--images", "3"]))
    _, url, _ = page.queue().launch(
        server_name="127.0.0.1", share=False, quiet=True, prevent_thread_lock=True
    )
    options = webdriver.ChromeOptions()
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{flag}")
    options.add_argument("--window-size=1200,900")
    options.binary_location = chromium
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))

    def find(tag, test):
        return [e for e in browser.find_elements("tag name", tag) if test(e)]

    def wait(condition):
        return WebDriverWait(browser, 120).until(lambda _: condition())

    try:
        browser.get(url)
        draw = wait(lambda: find("button", lambda e: e.text == "Draw"))[0]
        draw.click()
        is_picture = lambda e: e.get_attribute("src").startswith("data:image/png")  # noqa: E731
        pictures = wait(lambda: len(p := find("img", is_picture)) == 3 and p)
        wait(lambda: all(p.get_property("naturalWidth") == 112 for p in pictures))
        said = find("textarea", lambda e: "3 images" in e.get_attribute("value"))
        assert said and "network" in said[0].get_attribute("value")
        browser.save_screenshot(str(tmp_path / "page.png"))
        prompt = find("textarea", lambda e: e.get_attribute("value") == "a jay")[0]
        prompt.send_keys(*[webdriver.Keys.BACKSPACE] * len("a jay"))
        draw.click()
        wait(lambda: "none may be empty" in browser.find_element("tag name", "body").text)
        severe = [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]
        assert not severe, severe
    finally:
        browser.quit()
        page.close()
