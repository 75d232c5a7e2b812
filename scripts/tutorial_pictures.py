#!/usr/bin/env python3
"""Draw the pictures of docs/tutorial: of each chapter a section of `dtron explain`, taken by a headless browser.

    python scripts/tutorial_pictures.py docs/img

Needs Chromium (Debian: apt-get install --no-install-recommends chromium) and pillow.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

from dtron.config import read
from dtron.explain.facts import explain, setup_of
from dtron.explain.page import as_page
from dtron.explain.sections import sections

CONFIG = "configs/debug.toml"
WIDTH, HEIGHT, MARGIN = 900, 1400, 16  # pixels
# Chapter -> GPUs, keys, words that its section's title begins with.
CHAPTERS = {
    "1-one-gpu": (1, "", "Memory"),
    "2-data": (4, "--dp-replicate 2 --dp 2", "Ranks"),
    "3-tensor": (2, "--tp 2", "Ranks"),
    "4-sequence": (2, "--tp 2", "Tokens"),
    "5-context": (4, "--cp 4", "Tokens"),
    "6-pipeline": (4, "--pp 4 --training.local_batch_size 8 --model.n_layers 4", "Pipeline"),
    "7-experts": (4, "--ep 4 --model.name qwen3_moe", "Experts"),
    "8-together": (16, "--dp 2 --tp 2 --cp 2 --pp 2", "Ranks"),
}


def page(gpus: int, keys: str, title: str) -> str:
    """The page of a layout with one of its sections."""
    reading = read(["--job.config_file", CONFIG, *shlex.split(keys)])
    facts = explain(setup_of(reading.config, gpus, reading.mistakes), 0, 8)
    command = f"dtron explain {CONFIG} --gpus {gpus} {keys}".rstrip()
    chosen = [section for section in sections(facts, "") if section.title.startswith(title)]
    return as_page(f"{gpus} rank{'s' * (gpus > 1)}: {facts['layout']}", command, chosen)


def take(browser: str, html: str, picture: Path) -> None:
    """The page without the empty space around it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "page.html")
        file.write_text(html)
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}/p"]
        size = [f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={picture.resolve()}", file.as_uri()]
        subprocess.run([browser, *flags, *size], check=True, stderr=subprocess.DEVNULL)
    image = Image.open(picture).convert("RGB")
    empty = Image.new("RGB", image.size, image.getpixel((0, 0)))
    box = ImageChops.difference(image, empty).getbbox()
    assert box, f"{picture} is empty"
    left, top, right, bottom = box
    crop = max(0, left - MARGIN), max(0, top - MARGIN), min(WIDTH, right + MARGIN), min(HEIGHT, bottom + MARGIN)
    image.crop(crop).quantize(64).save(picture, optimize=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw the pictures of docs/tutorial.")
    parser.add_argument("folder", help="where chapter-N.png go")
    folder = Path(parser.parse_args().folder)
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        print("error: no chromium or google-chrome on the path", file=sys.stderr)
        return 1
    for chapter, given in CHAPTERS.items():
        take(browser, page(*given), folder / f"tutorial-{chapter}.png")
        print(folder / f"tutorial-{chapter}.png", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
