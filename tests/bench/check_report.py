"""Shows the reports in a headless Chromium, light and dark, wide and on a phone: `make check-report`."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
from browser import Tab, browser, find
from matplotlib import image
from sample_results import write_sample

from bench.finetuning.report import write_page
from bench.pretraining import store
from bench.report.document import make_report
from hbert.evaluate.marks import marks_of
from hbert.evaluate.report_command import write_report
from hbert.evaluate.run_folder import read_runs

SCREENS = {"wide": (1280, 900, 1.0), "phone": (390, 844, 2.0)}
SCHEMES = ("light", "dark")
_INSTALL = "no Chromium: install one, e.g. with apt-get install --no-install-recommends chromium"
_FEWEST_COLOURS = 50
_LOADED = "Array.from(document.images).every(image => image.complete && image.naturalWidth > 0)"
_WIDTH = "document.documentElement.scrollWidth"
_FOLDS = "document.querySelectorAll('details').forEach(fold => fold.open = true)"


def check(tab: Tab, page: Path, out: Path) -> list[str]:
    """Returns what is wrong with a page, and leaves its pictures in `out`."""
    found, brightness = [], {}
    for screen, (width, height, scale) in SCREENS.items():
        for scheme in SCHEMES:
            where = f"{page.parent.name} {screen} {scheme}"
            tab.open(page, width, height, scheme, scale)
            if not tab.value(_LOADED):
                found.append(f"{where}: an image is broken")
            shot = tab.picture()
            (out / f"{page.parent.name}-{screen}-{scheme}.png").write_bytes(shot)
            pixels = image.imread(io.BytesIO(shot))[..., :3]
            brightness[scheme] = pixels.mean()
            if len(np.unique((pixels[::3, ::3] * 255).astype(np.uint8).reshape(-1, 3), axis=0)) < _FEWEST_COLOURS:
                found.append(f"{where}: blank")
            tab.value(_FOLDS)
            if (needed := tab.value(_WIDTH)) > width:
                found.append(f"{where}: the page is {needed} pixels wide, the screen {width}")
        if brightness["dark"] > brightness["light"] / 2:
            found.append(f"{page.parent.name} {screen}: the dark form is not dark")
    return found


def pages_of_kept_results(out: Path) -> list[Path]:
    """Writes a page of hbert report and one of the fine-tuning experiments from results in docs/."""
    pretraining, finetuning = out / "pretraining", out / "finetuning"
    for folder in (pretraining, finetuning):
        folder.mkdir(exist_ok=True)
    runs = read_runs([store.RESULTS / "runs" / name for name in ("main-g-0", "main-b-0")])
    write_report(runs, marks_of(runs, store.RESULTS), pretraining, ("clock",))
    return [pretraining / "index.html", write_page(finetuning)]


def main(out: Path, others: list[Path]) -> int:
    """Makes a report of made-up results and pages of kept ones, looks at them and others, and returns the exit code."""
    program = find()
    if program is None:
        print(_INSTALL, file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    print("\n".join(make_report(write_sample(out))))
    pages = [out / "sample" / "index.html", *pages_of_kept_results(out), *others]
    with browser(program) as tab:
        found = [fault for page in pages for fault in check(tab, page, out)]
        found += tab.complaints
    print("\n".join(found) or f"nothing to complain of; the pictures are in {out}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), [Path(page) for page in sys.argv[2:]]))
