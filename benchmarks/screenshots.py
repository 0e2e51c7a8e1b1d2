"""Takes the screenshots of docs/report.md from a report's page: light, dark and on a phone.

python benchmarks/screenshots.py report.html [docs]
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

LOOKS = {
    "light": {"color_scheme": "light", "viewport": {"width": 1200, "height": 1500}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1200, "height": 1500}},
    "phone": {"color_scheme": "light", "viewport": {"width": 390, "height": 1400}, "is_mobile": True, "device_scale_factor": 2},
}


def main(page: Path, folder: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("screenshots need chromium: apt-get install chromium")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, look in LOOKS.items():
            tab = browser.new_page(**look)
            tab.goto(page.resolve().as_uri())
            picture = Image.open(io.BytesIO(tab.screenshot())).convert("RGB").quantize(64, dither=Image.Dither.NONE)
            path = folder / f"report-{name}.png"
            picture.save(path, optimize=True)
            print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")
            tab.close()
        browser.close()


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) == 3 else "docs"))
