"""Draw the pictures of `peftchat report` in the manual: `python scripts/make_report_pictures.py RUN…`.

One run makes the picture of one run (that of `make demo`), several make that of several. The pages are those of the
command, photographed by a headless Chromium. Folders of the machine are taken out of them.
"""

import re
import sys
import tempfile
from pathlib import Path

from photograph import photograph

from peftchat import api

PICTURES = Path("docs/pictures")
SIZE_OF_ONE = "1000,1120"
SIZE_OF_SEVERAL = "1000,1000"


def main() -> None:
    runs = [Path(name) for name in sys.argv[1:]]
    name, size = ("run", SIZE_OF_ONE) if len(runs) == 1 else ("overlay", SIZE_OF_SEVERAL)
    with tempfile.TemporaryDirectory() as folder:
        page = api.report(runs, output=Path(folder, f"{name}.html"))
        text = page.read_text(encoding="utf-8")
        page.write_text(re.sub(r"(?<=[\s>])/[\w./-]*/", "", text), encoding="utf-8")
        photograph(page, PICTURES / f"report-{name}.png", size)


if __name__ == "__main__":
    main()
