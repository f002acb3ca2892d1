"""What became of the dialogues of one side."""

from dataclasses import dataclass, field

_NAMED = 5


@dataclass(slots=True)
class RowStats:
    """What became of the dialogues of one side.

    Attributes:
        rows: rows that are kept.
        tokens: their tokens.
        supervised: their tokens that carry a target.
        dropped: dialogues and rows that are not, by reason.
        named: the first few sources of each reason, and of the dialogues that were `shortened` or `divided`.
        shortened: dialogues that lost exchanges to fit `data.max_length`.
        exchanges_cut: exchanges lost that way.
        divided: dialogues that became several rows to fit.
        parts: those rows.
        lookalikes: stretches spelled like a special token, encoded as ordinary text.
        forms: the form each source file was read as.
        notes: rows that a source changed, by what it did.
    """

    rows: int = 0
    tokens: int = 0
    supervised: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    named: dict[str, list[str]] = field(default_factory=dict)
    shortened: int = 0
    exchanges_cut: int = 0
    divided: int = 0
    parts: int = 0
    lookalikes: int = 0
    forms: dict[str, str] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str, source: str) -> None:
        """Count a row that is left out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self._name(reason, source)

    def shorten(self, exchanges: int, source: str) -> None:
        """Count a dialogue that lost exchanges."""
        self.shortened += 1
        self.exchanges_cut += exchanges
        self._name("shortened", source)

    def divide(self, parts: int, source: str) -> None:
        """Count a dialogue that became several rows."""
        self.divided += 1
        self.parts += parts
        self._name("divided", source)

    def _name(self, what: str, source: str) -> None:
        named = self.named.setdefault(what, [])
        if len(named) < _NAMED:
            named.append(source)
