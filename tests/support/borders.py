"""Rows against the ids of a whole text, where a token of the latter may span the border of header and answer."""

import itertools
import re
from typing import Any

from peftchat.chat_template.examples import EncodedExample
from peftchat.chat_template.loss_mask import loss_mask_table


def check_borders(tokenizer: Any, row: EncodedExample, ids: list[int], header: list[int]) -> None:
    """Check that every answer stands behind the ids that its header has alone, and that the text is the same.

    Args:
        tokenizer: decodes.
        row: the example.
        ids: the whole text's ids.
        header: ids of the header of an answer, with nothing behind it.
    """
    trained = loss_mask_table("answers")[row.token_tags].tolist()
    for kind, group in itertools.groupby(range(len(trained)), lambda at: trained[at]):
        start = next(group)
        if kind:
            assert row.ids[max(start - len(header), 0) : start].tolist() == header
    assert spelled(tokenizer, row.ids.tolist()) == spelled(tokenizer, ids)


def spelled(tokenizer: Any, ids: list[int]) -> str:
    """The text, neighboring unknown characters as one, and no white space where it is stripped or collapsed."""
    text = re.sub(r"(<unk>|\[UNK\]|▁|\s(?=<unk>))+", "?", tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    strips = any(token.rstrip for token in tokenizer.added_tokens_decoder.values() if token.special)
    again = tokenizer.decode(tokenizer.encode("a \n b", add_special_tokens=False), clean_up_tokenization_spaces=False)
    return "".join(text.split()).replace("?", "") if strips or again != "a \n b" else text
