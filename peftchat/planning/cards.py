"""The catalogue of cards as people read it; without the libraries that a plan needs."""

from rich import box
from rich.table import Table

from peftchat.planning.hardware import catalogue


def catalogue_table() -> Table:
    """Every card that `--gpu` knows."""
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    for title in ("name", "card"):
        table.add_column(title)
    for title in ("GiB usable", "TFLOP/s in 16 bits", "GB/s"):
        table.add_column(title, justify="right")
    table.add_column("source", style="dim")
    for card in catalogue().values():
        numbers = (f"{card.memory / 2**30:.1f}", f"{card.tflops:g}", f"{card.bandwidth:,.0f}")
        table.add_row(card.name, card.label, *numbers, card.source)
    return table
