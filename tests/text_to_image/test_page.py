"""The page: what it draws, what it says, and what it keeps to itself."""

import base64
import importlib.util
import io
import json
import re
import shutil
import urllib.request

import pytest

gr = pytest.importorskip("gradio", reason="needs gradio (optional)")
pytest.importorskip("diffusers", reason="needs requirements-extra.txt (diffusers)")
pytest.importorskip("transformers", reason="needs requirements-extra.txt (transformers)")
pytest.importorskip("peft", reason="needs requirements-extra.txt (peft)")

import text_to_image.generate as generate  # noqa: E402
from common.cli import parse  # noqa: E402
from text_to_image.generate import Settings, main  # noqa: E402
from text_to_image.page import build_page  # noqa: E402

FLAGS = ["--ui", "--tiny", "--device", "cpu", "--prompt", "a jay", "--total-substeps", "8"]


EDITING = {"gm-qwen": False, "gm-flux2": True}
SETTINGS = {"model": "gm-qwen", "nfe": 0, "temperature": 0, "seed": 3, "images": 1, "width": 0,
            "height": None, "references": None, "with_trajectory": False}  # fmt: skip


def page_of(*flags: str):
    settings = parse(Settings, "", [*FLAGS, *flags])
    return build_page(settings, EDITING, generate.load_from, generate.draw)


def draw(page, prompt: str = "a jay", **options):
    """-> pictures, trajectory, status."""
    (function,) = (f for f in page.fns.values() if f.api_name == "draw")
    return function.fn(prompt, *(SETTINGS | options).values())


def test_drawing_on_the_page(tmp_path):
    page = page_of()
    size = {"width": 48, "height": 64}
    pictures, trajectory, status = draw(page, images=2, **size)
    assert pictures.count("<img") == 2 and "seed 3" in pictures and "seed 4" in pictures
    assert trajectory == "" and status == "2 images, seeds 3 to 4"
    status = draw(page, nfe=3, **size)[2]
    assert "1 images, seed 3\n" in status and "trained for 4" in status
    for bad, message in (({"prompt": " "}, "it is empty"), ({"height": 8}, "--height is 8"),
                         ({"seed": -1}, "--seed is -1"), ({"seed": 2**64}, "--seed is"),
                         ({"width": 10**6}, "--width is 1000000")):  # fmt: skip
        with pytest.raises(gr.Error, match=message):
            draw(page, **bad)
    assert str(tmp_path) not in pictures + status


def test_limits_are_found_before_a_model_is_loaded():
    settings = parse(Settings, "", FLAGS)
    page = build_page(settings, EDITING, lambda chosen: pytest.fail("loads"), generate.draw)
    with pytest.raises(gr.Error, match="--seed is"):
        draw(page, seed=2**64)


def test_the_trajectory_has_a_thumbnail_for_each_evaluation():
    pictures, trajectory, _ = draw(page_of(), with_trajectory=True, images=2)
    assert pictures.count("<img") == 2 and trajectory.count("<img") == 4
    times = re.findall(r"<br>t = ([\d.]+)<", trajectory)
    assert times == ["1.00", "0.89", "0.71", "0.35"]  # shift 3.2, raw times 1, 5/7, 3/7, 1/7


def test_editing_on_the_page(tmp_path):
    """References change the picture, and its size follows theirs; other models ignore them."""
    from PIL import Image

    page, files = page_of("--total-substeps", "4"), []
    for name, color in (("a", "black"), ("b", "white")):
        Image.new("RGB", (80, 64), color).save(tmp_path / f"{name}.png")
        files.append(str(tmp_path / f"{name}.png"))
    runs = [draw(page, model="gm-flux2", references=given)[0] for given in (None, files[:1], files)]
    assert len(set(runs)) == 3
    assert size_of(runs[1]) == size_of(runs[2]) == (80, 64) and size_of(runs[0]) == (64, 64)
    plain, given = (draw(page, references=files[:n])[0] for n in (0, 1))
    assert plain == given  # left over from the other model
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(gr.Error, match="cannot be read as an image"):
        draw(page, model="gm-flux2", references=files)


def size_of(pictures: str) -> tuple[int, int]:
    from PIL import Image

    data = re.search(r"base64,([^\"]+)", pictures)[1]
    return Image.open(io.BytesIO(base64.b64decode(data))).size


def test_errors_of_loading_go_to_the_terminal(tmp_path, capsys):
    """They name local files, which a page that others may see does not show."""
    page = page_of("--adapter", str(tmp_path))
    with pytest.raises(gr.Error) as error:
        draw(page)
    assert "gm-qwen could not be loaded" in str(error.value)
    assert str(tmp_path) not in str(error.value) and str(tmp_path) in capsys.readouterr().err
    assert str(tmp_path) not in json.dumps(page.get_config_file(), default=str)


def test_the_page_listens_on_the_loopback_address_unless_told_otherwise(monkeypatch):
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
        assert "Evaluations (0: as trained)" in text
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
    """The page with tiny models, in headless Chromium: draw, read the pictures, see an error."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromium-driver")
    from PIL import Image
    from selenium.webdriver.support.ui import WebDriverWait

    Image.new("RGB", (80, 64), "red").save(tmp_path / "red.png")
    page = page_of("--images", "3")
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
        draw_button = wait(lambda: find("button", lambda e: e.text == "Draw"))[0]
        draw_button.click()
        is_picture = lambda e: e.get_attribute("src").startswith("data:image/png")  # noqa: E731
        pictures = wait(lambda: len(p := find("img", is_picture)) == 7 and p)
        wait(lambda: all(p.get_property("naturalWidth") == 112 for p in pictures))
        assert find("textarea", lambda e: "3 images, seeds 0 to 2" in e.get_attribute("value"))
        thumbnails = find("img", lambda e: e.get_attribute("alt").startswith("t = "))
        assert len(thumbnails) == 4 and len(find("img", lambda e: True)) >= 7
        assert all(e.get_property("naturalWidth") == 112 for e in thumbnails)
        browser.save_screenshot(str(tmp_path / "page.png"))

        seed = find("input", lambda e: e.get_attribute("aria-label") == "Seed")[0]
        find("button", lambda e: e.text == "Random seed")[0].click()
        wait(lambda: seed.get_attribute("value") != "0")
        draw_button.click()
        drawn = f"seeds {seed.get_attribute('value')} to "
        wait(lambda: find("textarea", lambda e: drawn in e.get_attribute("value")))

        assert not find("input", lambda e: e.get_attribute("type") == "file" and e.is_enabled())
        find("input", lambda e: e.get_attribute("aria-label") == "Model")[0].click()
        wait(lambda: find("li", lambda e: "gm-flux2" in e.text))[0].click()
        upload = wait(lambda: find("input", lambda e: e.get_attribute("type") == "file"))[0]
        upload.send_keys(str(tmp_path / "red.png"))
        wait(lambda: "red" in browser.find_element("tag name", "body").text)
        draw_button.click()
        wait(lambda: any(e.get_property("naturalWidth") == 80 for e in find("img", is_picture)))
        browser.save_screenshot(str(tmp_path / "edited.png"))

        prompt = find("textarea", lambda e: e.get_attribute("value") == "a jay")[0]
        prompt.send_keys(*[webdriver.Keys.BACKSPACE] * len("a jay"))
        draw_button.click()
        wait(lambda: "it is empty" in browser.find_element("tag name", "body").text)
        severe = [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]
        assert not severe, severe
    finally:
        browser.quit()
        page.close()
