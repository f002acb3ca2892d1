"""How rows are read, apart from where they lie and what form they have."""

from dataclasses import dataclass

from peftchat.sources.row import MAX_ROW_BYTES


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """Settings of one reading.

    Attributes:
        languages: keep only dialogues in these languages (`en`, `pt-BR`; `pt` includes `pt-BR`); empty keeps all.
            The row's own `lang` field decides where there is one, else a detector.
        top_k: OASST only: of each turn's ranked replies, follow the best `top_k`; None follows all.
        max_row_bytes: a longer row is a problem and is not read into memory.
    """

    languages: tuple[str, ...] = ()
    top_k: int | None = None
    max_row_bytes: int = MAX_ROW_BYTES
