"""Take a picture of a report in headless Chromium: `python tools/screenshot.py report.html picture.png`."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# A page from a file needs none of the browser's own traffic.
_QUIET = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")


def take(page_file: Path, picture: Path, width: int, height: int) -> None:
    """Write a PNG of the top of a page, `width` by `height` CSS pixels."""
    from playwright.sync_api import sync_playwright

    browser_file = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if browser_file is None:
        sys.exit(f"no browser found: install one of {', '.join(_BROWSERS)}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_file, args=["--no-sandbox", *_QUIET])
        page = browser.new_page(viewport={"width": width, "height": height})
        page.goto(page_file.resolve().as_uri())
        page.wait_for_timeout(500)
        picture.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(picture))
        browser.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1200)
    parser.add_argument("--height", type=int, default=1400)
    options = parser.parse_args()
    take(options.page, options.picture, options.width, options.height)
