"""Take a picture of a page with a headless Chromium; other scripts import this."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def photograph(page: Path, picture: Path, size: str) -> None:
    """Write the picture of a page.

    Args:
        page: an HTML file.
        picture: the PNG.
        size: width and height of the window, such as `1000,1480`.
    """
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next((found for found in map(shutil.which, names) if found), None)
    if browser is None:
        sys.exit("no Chromium here: the page was not photographed")
    with tempfile.TemporaryDirectory() as user:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={user}"]
        command = [browser, *flags, f"--window-size={size}", f"--screenshot={picture.absolute()}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
