"""Takes the pictures of docs/report.md from a report's page: its beginning, its heat map in dark colours, both on a phone.

python benchmarks/screenshots.py report.html [folder]
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

DESK = {"viewport": {"width": 1200, "height": 1500}}
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "device_scale_factor": 1.5}
LOOKS = {
    "light": (DESK, "light", ["summary"]),
    "dark": (DESK, "dark", ["sparsity"]),
    "phone": (PHONE, "light", ["summary", "comparison", "sparsity"]),
}
COLOURS, GAP = 200, 30


def screens(browser: Browser, page: Path, device: dict, scheme: str, sections: list[str]) -> list[Image.Image]:
    """A screenshot from the beginning of each section, or of the page where it is the summary."""
    tab = browser.new_page(color_scheme=scheme, **device)
    taken = []
    for section in sections:
        tab.goto(page.resolve().as_uri() + ("" if section == "summary" else f"#{section}"))
        taken.append(Image.open(io.BytesIO(tab.screenshot())).convert("RGB"))
    tab.close()
    return taken


def main(page: Path, folder: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("screenshots need chromium: apt-get install chromium")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"])
        for name, (device, scheme, sections) in LOOKS.items():
            taken = screens(browser, page, device, scheme, sections)
            width = sum(one.width for one in taken) + GAP * (len(taken) - 1)
            picture = Image.new("RGB", (width, taken[0].height), "#c3c9d1")
            for index, one in enumerate(taken):
                picture.paste(one, (index * (one.width + GAP), 0))
            path = folder / f"report-{name}.png"
            picture.quantize(COLOURS, kmeans=2, dither=Image.Dither.NONE).save(path, optimize=True)
            print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")
        browser.close()


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) == 3 else "docs"))
