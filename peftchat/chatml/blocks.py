"""Rows of the block formats, where all but the contents is known beforehand.

Between two special tokens of such a format stands the end of a header and one content. Only that stretch goes through
the tokenizer; the ids around it, and the codes of everything, are made once for each kind of turn.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from peftchat.chatml.mask import Codes, Ids, Part, code, rank
from peftchat.chatml.rows import RowBatch
from peftchat.chatml.template import BlockTemplate
from peftchat.chatml.text import TextEncoder
from peftchat.conversation import Conversation, Role


@dataclass(frozen=True, slots=True)
class _Turn:
    """What all turns of one role have in common.

    Attributes:
        before: ids in front of the header's text.
        head: the header's text, which is encoded together with the content.
        head_ids: its ids, where it stands alone.
        after: ids of the end token and of the newline behind it.
        values: the codes of `before`, `head`, the content, the end token and the newline.
    """

    before: list[int]
    head: str
    head_ids: list[int]
    after: list[int]
    values: bytes


class BlockEncoder:
    """Encodes conversations in a block format.

    Args:
        text: encodes ordinary text.
        template: a format that `supports` accepts.
    """

    def __init__(self, text: TextEncoder, template: BlockTemplate) -> None:
        self._text = text
        self._template = template
        self._turns = {(role, last): self._turn(role, last) for role in template.header for last in (False, True)}

    @staticmethod
    def supports(text: TextEncoder, template: BlockTemplate) -> bool:
        """Whether every header is special tokens and then one text, whose ids alone tell where it ends."""
        return all(
            len(header) > 1
            and all(special for _, special in header[:-1])
            and not header[-1][1]
            and text.spells(text.encode([header[-1][0]])[0])
            for header in template.header.values()
        )

    def _turn(self, role: Role, last: bool) -> _Turn:
        *specials, (head, _) = self._template.header[role]
        head_ids, trailer = self._text.encode([head, "\n"])
        parts = (Part.HEADER, Part.HEADER, Part.CONTENT, Part.END, *[Part.TRAILER] * len(trailer))
        return _Turn(
            [self._text.special[token] for token, _ in specials],
            head,
            head_ids,
            [self._text.special[self._template.end_token], *trailer],
            bytes(code(part, role, last_answer=last) for part in parts),
        )

    def batch(self, conversations: Iterable[Conversation]) -> RowBatch:
        """Rows of the conversations, in order.

        Raises:
            InputError: the format cannot write one of them.
        """
        turns: list[_Turn] = []
        contents: list[str] = []
        ends: list[int] = []
        sources: list[str] = []
        said: list[str] = []
        said_ends: list[int] = []
        for conversation in conversations:
            said += [message.content for message in conversation.messages]
            said_ends.append(len(said))
            for role, content, last in self._template.turns(conversation):
                turns.append(self._turns[role, last])
                contents.append(content)
            ends.append(len(turns))
            sources.append(conversation.source)
        encoded = self._text.encode([turn.head + content for turn, content in zip(turns, contents, strict=True)])
        ids, codes, starts = _laid_out(turns, encoded, self._straddled(turns, contents, encoded))
        alike = np.cumsum([0, *self._text.lookalikes(said)])
        lookalikes = np.diff(alike[[0, *said_ends]]).astype(np.int32)
        return RowBatch(ids, codes, starts[[0, *ends]], sources, lookalikes)

    def _straddled(
        self, turns: Sequence[_Turn], contents: Sequence[str], encoded: Sequence[list[int]]
    ) -> dict[int, bytes]:
        """For each turn with a token that covers both header and content: the codes of the ids of the two."""
        found = [
            number
            for number, (turn, ids) in enumerate(zip(turns, encoded, strict=True))
            if ids[: len(turn.head_ids)] != turn.head_ids
        ]
        located = self._text.encode_parts([(turns[number].head, contents[number]) for number in found])
        codes: dict[int, bytes] = {}
        for number, tokens in zip(found, located, strict=True):
            values = turns[number].values[1:3]
            winner = min(values, key=rank)
            codes[number] = bytes(values[first] if first == last else winner for first, last in tokens.parts)
        return codes


def _laid_out(
    turns: Sequence[_Turn], encoded: Sequence[list[int]], straddled: Mapping[int, bytes]
) -> tuple[Ids, Codes, npt.NDArray[np.int64]]:
    """Ids and codes of all turns end to end, and where each turn begins.

    Args:
        turns: what surrounds the contents.
        encoded: ids of each header's text and content.
        straddled: codes of those ids where they do not simply follow from the header's length.
    """
    ids: list[int] = []
    values = bytearray()  # codes, each to be repeated as often as `counts` says
    counts: list[int] = []
    lengths: list[int] = []
    for number, (turn, middle) in enumerate(zip(turns, encoded, strict=True)):
        ids += turn.before
        ids += middle
        ids += turn.after
        head = len(turn.head_ids)
        if number in straddled:
            values += turn.values[:1] + straddled[number] + turn.values[3:]
            counts += (len(turn.before), *[1] * (len(middle) + len(turn.after)))
        else:
            values += turn.values
            counts += (len(turn.before), head, len(middle) - head, *[1] * len(turn.after))
        lengths.append(len(turn.before) + len(middle) + len(turn.after))
    codes = np.repeat(np.frombuffer(values, dtype=np.uint8), counts)
    return np.array(ids, dtype=np.int32), codes, np.cumsum([0, *lengths], dtype=np.int64)
