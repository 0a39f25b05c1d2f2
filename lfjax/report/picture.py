"""A picture of a report, for a README: `python -m lfjax.report.picture runs/x/report.html report.png`.

Needs Chromium or Chrome on the path.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

from lfjax.config import InputError

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find_browser() -> str | None:
    """The first browser on the path that can take pictures without a screen."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


def take(page: str | os.PathLike, picture: str | os.PathLike, *, width: int = 1180, height: int = 1520) -> pathlib.Path:
    """Writes the top of an HTML page, `width` x `height` CSS pixels, as a PNG.

    Raises:
      InputError: no such page, no browser on the path, or the browser wrote no picture.
    """
    page, picture = pathlib.Path(page).resolve(), pathlib.Path(picture).resolve()
    if not page.is_file():
        raise InputError(f"{page}: no such page; make it with lfjax report WORKDIR")
    browser = find_browser()
    if browser is None:
        raise InputError(f"no browser to take a picture with; install one of {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory() as profile:
        options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}")
        command = [browser, *options, f"--window-size={width},{height}", f"--screenshot={picture}", page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode or not picture.is_file():
        cause = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise InputError(f"{picture}: {browser} wrote no picture: {cause}")
    return picture


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m lfjax.report.picture REPORT.html PICTURE.png")
    try:
        print(take(sys.argv[1], sys.argv[2]))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
