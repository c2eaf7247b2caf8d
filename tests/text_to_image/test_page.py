"""The page: what it draws, what it says, and whom it lets in."""

import importlib.util
import shutil
import urllib.request

import pytest
from PIL import Image

gr = pytest.importorskip("gradio", reason="needs gradio (optional)")
pytest.importorskip("diffusers", reason="needs requirements-extra.txt (diffusers)")
pytest.importorskip("transformers", reason="needs requirements-extra.txt (transformers)")
pytest.importorskip("peft", reason="needs requirements-extra.txt (peft)")

from t2i_cases import tiny  # noqa: E402

import text_to_image.generate as generate  # noqa: E402
from common.cli import parse  # noqa: E402
from text_to_image.generate import Settings, main  # noqa: E402
from text_to_image.page import build_page  # noqa: E402

FLAGS = ["--ui", "--tiny", "--device", "cpu", "--prompt", "a jay", "--total-substeps", "8"]
INPUTS = {"nfe": 0, "seed": 3, "images": 1, "width": 0, "height": None, "references": None}


def page_of(model: str = "gm-qwen", *flags: str):
    settings = parse(Settings, "", [*FLAGS, "--model", model, *flags])
    return build_page(settings, tiny(model), generate.draw)


def draw(page, prompt: str = "a jay", **options):
    """-> pictures and estimates, (image, caption) each, and warnings."""
    (function,) = (f for f in page.fns.values() if f.api_name == "draw")
    return function.fn(prompt, *(INPUTS | options).values())


def test_drawing_on_the_page():
    page = page_of()
    size = {"width": 48, "height": 64}
    pictures, estimates, said = draw(page, images=2, **size)
    assert [caption for _, caption in pictures] == ["seed 3", "seed 4"] and said == ""
    assert pictures[0][0].size == (48, 64) and pictures[0][0] != pictures[1][0]
    captions = [caption for _, caption in estimates]  # shift 3.2, raw times 1, 5/7, 3/7, 1/7
    assert captions == ["t = 1.00", "t = 0.89", "t = 0.71", "t = 0.35"]
    assert estimates[0][0].size == (48, 64)
    assert "trained for 4" in draw(page, nfe=3, **size)[2]
    assert draw(page, seed=None, **size)[0] == draw(page, seed=0, **size)[0]
    for bad, message in (({"height": 8}, "--height is 8"), ({"seed": -1}, "--seed is -1"),
                         ({"prompt": " "}, "none may be empty"),
                         ({"seed": 2**64}, "--seed is"), ({"height": 72}, "multiples of 16"),
                         ({"width": 10**6}, "--width is 1000000")):  # fmt: skip
        with pytest.raises(gr.Error, match=message):
            draw(page, **bad)


def test_editing_on_the_page(tmp_path):
    """References change the picture, and its size follows theirs."""
    page, files = page_of("gm-flux2", "--total-substeps", "4"), []
    for name, color in (("a", "black"), ("b", "white")):
        Image.new("RGB", (80, 64), color).save(tmp_path / f"{name}.png")
        files.append(str(tmp_path / f"{name}.png"))
    runs = [draw(page, references=given)[0][0][0] for given in (None, files[:1], files)]
    assert runs[1].size == runs[2].size == (80, 64) and runs[0].size == (64, 64)
    assert runs[1] != runs[2]
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(gr.Error, match="cannot be read as an image"):
        draw(page, references=files)


def test_the_page_listens_on_the_loopback_address_unless_host_says_otherwise(monkeypatch):
    """Also where the environment says otherwise."""
    given = []
    monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
    monkeypatch.setenv("GRADIO_SHARE", "True")
    monkeypatch.setattr(gr.Blocks, "block_thread", lambda self: given.append(self))
    main([*FLAGS, "--port", str(free_port())])
    (page,) = given
    try:
        assert page.server_name == "127.0.0.1" and not page.share
        with urllib.request.urlopen(f"http://127.0.0.1:{page.server_port}/config") as reply:
            text = reply.read().decode()
        assert "Evaluations, 0: as trained" in text
    finally:
        page.close()
    launched = {}
    monkeypatch.setattr(gr.Blocks, "launch", lambda self, **o: launched.update(o) or (0, "", 0))
    main([*FLAGS, "--host", "0.0.0.0"])
    assert launched["server_name"] == "0.0.0.0" and launched["share"] is False
    main([*FLAGS, "--share"])
    assert launched["server_name"] == "127.0.0.1" and launched["share"] is True


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
    """The page with a tiny model, in headless Chromium: edit, draw, see the pictures, an error."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromium-driver")
    from selenium.webdriver.support.ui import WebDriverWait

    Image.new("RGB", (80, 64), "red").save(tmp_path / "red.png")
    page = page_of("gm-flux2", "--images", "3")
    _, url, _ = page.launch(
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

    def pictures(width):
        return find("img", lambda e: e.get_property("naturalWidth") == width)

    try:
        browser.get(url)
        draw_button = wait(lambda: find("button", lambda e: e.text == "Draw"))[0]
        draw_button.click()
        wait(lambda: len(pictures(64)) == 7)
        browser.save_screenshot(str(tmp_path / "page.png"))
        upload = find("input", lambda e: e.get_attribute("type") == "file")[-1]
        upload.send_keys(str(tmp_path / "red.png"))
        wait(lambda: "red" in browser.find_element("tag name", "body").text)
        draw_button.click()
        wait(lambda: len(pictures(80)) == 7)
        browser.save_screenshot(str(tmp_path / "edited.png"))

        seed = find("input", lambda e: e.get_attribute("aria-label") == "Seed")[0]
        find("button", lambda e: e.text == "Random seed")[0].click()
        wait(lambda: seed.get_attribute("value") != "0")
        draw_button.click()
        first = f"seed {seed.get_attribute('value')}"
        wait(lambda: first in browser.find_element("tag name", "body").text)

        seed.clear()
        seed.send_keys("-1")
        draw_button.click()
        wait(lambda: "--seed is -1" in browser.find_element("tag name", "body").text)
        severe = [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]
        assert not severe, severe
    finally:
        browser.quit()
        page.close()
