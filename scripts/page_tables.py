"""Write a table between its marks in a page of the manual; other scripts import this."""

from pathlib import Path

from peftchat.files import write_text


def write_table(page: Path, name: str, table: str) -> None:
    """Replace what stands between the marks of a script.

    Args:
        page: has `<!-- NAME: begin -->` and `<!-- NAME: end -->`.
        name: of the script.
        table: the text, with the line breaks around it.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    write_text(page, f"{before}{begin}{table}{end}{rest.partition(end)[2]}")
