"""Draw the pictures of `peftchat mask` in the manual: `python scripts/make_mask_pictures.py` (after `make demo`).

The terminal is what rich records of the command's own output; the page is photographed by a headless Chromium.
"""

import io
import tempfile
from pathlib import Path

from photograph import photograph
from rich.console import Console
from rich.terminal_theme import TerminalTheme

from peftchat.library_setup import prepare_libraries
from peftchat.recipe import load_recipe
from peftchat.reports.mask import inspect_mask
from peftchat.reports.mask_render import print_mask, write_mask_page

RECIPE = Path("recipes/demo_cpu.yaml")
PICTURES = Path("docs/pictures")
ROWS = 3
PAGE_SIZE = "1000,1480"

# rich's own theme draws black as gray, which no terminal does.
_COLORS = [(224, 108, 117), (140, 194, 101), (209, 154, 102), (97, 175, 239), (198, 120, 221), (86, 182, 194)]
_GROUND, _TEXT, _GREY = (24, 26, 31), (200, 204, 212), (128, 136, 152)
THEME = TerminalTheme(_GROUND, _TEXT, [_GROUND, *_COLORS, _TEXT], [_GREY, *_COLORS, (255, 255, 255)])


def main() -> None:
    recipe = load_recipe(RECIPE, (), to_train=False).recipe
    prepare_libraries()
    look = inspect_mask(recipe, "train", lambda conversations: None)
    PICTURES.mkdir(parents=True, exist_ok=True)
    console = Console(record=True, width=96, force_terminal=True, color_system="standard", file=io.StringIO())
    print_mask(look.shown(ROWS), look.summary, console)
    console.save_svg(str(PICTURES / "mask-terminal.svg"), title=f"peftchat mask {RECIPE}", theme=THEME)
    with tempfile.TemporaryDirectory() as folder:
        page = write_mask_page(Path(folder) / "mask.html", RECIPE.name, list(look.shown(ROWS)), look.summary)
        photograph(page, PICTURES / "mask-page.png", PAGE_SIZE)


if __name__ == "__main__":
    main()
