"""Pictures of the page for the README: `python -m tests.serve.screenshots http://127.0.0.1:8000 docs`, against a
server of the quickstart's model."""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path

import numpy as np
import PIL.Image
from playwright.sync_api import Browser, Locator, Page, sync_playwright

from mm_jax.data.quickstart.shapes import draw_scene, paint

FLAGS = (
    "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync "
    "--no-first-run --force-color-profile=srgb"
).split()


def chromium() -> str | None:
    """Where a browser is."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for path in map(shutil.which, names) if path), None)


def launch(playwright) -> Browser:
    return playwright.chromium.launch(executable_path=chromium(), headless=True, args=FLAGS)


def ask(page: Page, question: str, *files: Path) -> Locator:
    """Send a question with its files and wait for the end of the answer."""
    before = page.locator(".message.assistant").count()
    if files:
        page.set_input_files("#files", [str(file) for file in files])
        page.locator("#attached figure").nth(len(files) - 1).wait_for()
    page.fill("#question", question)
    page.click("#send")
    answer = page.locator(".message.assistant.done").nth(before)
    answer.wait_for(timeout=120_000)
    return answer


def main(url: str, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    folder = Path(sys.argv[0]).parent / "__pycache__"
    folder.mkdir(exist_ok=True)
    scene = draw_scene(random.Random(20), 3)
    files = [folder / "scene.png"]
    paint(random.Random(0), scene).image.save(files[0])
    name = "red cross"
    with sync_playwright() as playwright:
        browser = launch(playwright)
        page = browser.new_page(viewport={"width": 860, "height": 800})
        page.goto(url)
        ask(page, f"give the box of the {name}.", files[0])
        ask(page, f"where is the {name}?")
        page.locator(".message.assistant").last.locator(".word").first.click()
        page.evaluate("toEnd()")
        page.wait_for_timeout(600)
        save(page, out / "page.png", 128)
        page.set_viewport_size({"width": 390, "height": 780})
        page.evaluate("toEnd()")
        page.wait_for_timeout(600)
        save(page, out / "page-phone.png", 128)
        browser.close()


def save(page: Page, path: Path, colours: int) -> None:
    page.screenshot(path=str(path))
    picture = PIL.Image.open(path).convert("RGB")
    picture.quantize(colours, dither=PIL.Image.Dither.NONE).save(path, optimize=True)
    print(path, np.asarray(picture).shape, path.stat().st_size)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
