"""OpenAssistant's messages as their exports hold them."""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from peftchat.sources.forms.turns import text_field, type_name
from peftchat.sources.problems import RowError

ExportRole = Literal["prompter", "assistant"]
_ROLES: dict[str, ExportRole] = {"prompter": "prompter", "assistant": "assistant"}


@dataclass(slots=True, eq=False)
class TreeMessage:
    """A message with its replies in export order.

    Attributes:
        rank: place among its siblings by people's votes, 0 the best; None where nobody ranked.
        reviewed: the reviewers' verdict; None where the export does not say.
    """

    text: str
    role: ExportRole
    lang: str
    reviewed: bool | None
    deleted: bool
    synthetic: bool
    rank: int | None
    replies: list["TreeMessage"] = field(default_factory=list)


def parse_message(fields: Mapping[str, Any]) -> TreeMessage:
    """One message without its replies.

    Raises:
        RowError: text, role or rank are not what the export format says.
    """
    name = text_field(fields, "role")
    role = _ROLES.get(name)
    if role is None:
        raise RowError("unknown_role", f"unknown role {reprlib.repr(name)}; OpenAssistant's are prompter, assistant")
    rank = fields.get("rank")
    # A column with gaps comes out of pandas as floats, the gaps as NaN.
    if isinstance(rank, float):
        rank = None if math.isnan(rank) else int(rank) if rank.is_integer() else rank
    if rank is not None and type(rank) is not int:
        raise RowError("wrong_type", f"'rank' must be a whole number, it is {type_name(rank)}")
    return TreeMessage(
        text=text_field(fields, "text"),
        role=role,
        lang=str(fields.get("lang") or ""),
        reviewed=fields.get("review_result"),
        deleted=bool(fields.get("deleted")),
        synthetic=bool(fields.get("synthetic")),
        rank=rank,
    )


def parse_tree(prompt: Mapping[str, Any]) -> TreeMessage:
    """A message and, through `replies`, everything below it.

    Raises:
        RowError: a message below it cannot be parsed.
    """
    root = parse_message(prompt)
    open_messages = [(root, prompt)]
    while open_messages:
        message, fields = open_messages.pop()
        replies = fields.get("replies") or []
        if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
            raise RowError("wrong_type", f"'replies' must be a list of messages, it is {type_name(replies)}")
        message.replies = [parse_message(reply) for reply in replies]
        open_messages.extend(zip(message.replies, replies, strict=True))
    return root
