"""Headless Chromium for the tests of pages, or a skipped test where there is none."""

import shutil
from pathlib import Path

import pytest

FLAGS = (
    "headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "disable-quic",
    "no-first-run", "disable-background-networking", "disable-component-update", "disable-sync",
)  # fmt: skip


def open_browser(profile: Path, *flags: str, size: tuple[int, int] = (1280, 900)):
    """A selenium driver with an empty profile folder. Its owner calls quit()."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    chromium = shutil.which("chromium")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromium-driver (Debian's packages)")
    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, *flags, f"user-data-dir={profile}", f"window-size={size[0]},{size[1]}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.binary_location = chromium
    return webdriver.Chrome(options, webdriver.ChromeService(driver))
