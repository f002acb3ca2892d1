"""OpenAssistant's own rules: which trees, and which paths through them, become dialogues.

They are those of the loader the project trained its models with (`oasst_dataset.py` in its repository), and the
exclusion of synthetic messages.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal

from peftchat.sources.oasst.message import TreeMessage

TreeRule = Literal["tree_not_ready", "prompt_not_reviewed", "prompt_in_other_language"]
PathRule = Literal[
    "prompt_without_reply",
    "path_with_deleted_message",
    "path_with_synthetic_message",
    "open_turn_that_is_not_the_first_reply",
    "reply_ranked_below_top_k",
    "roles_do_not_alternate",
]

RULES: dict[TreeRule | PathRule, str] = {
    "tree_not_ready": "trees whose state is not ready_for_export",
    "prompt_not_reviewed": "trees whose prompt did not pass review",
    "prompt_in_other_language": "trees whose prompt is in another language",
    "prompt_without_reply": "paths that are a prompt and nothing else",
    "path_with_deleted_message": "paths with a deleted message",
    "path_with_synthetic_message": "paths with a message written by a model",
    "open_turn_that_is_not_the_first_reply": "paths that end in a user turn other than its parent's first reply",
    "reply_ranked_below_top_k": "paths with a reply ranked below top_k, or unranked among siblings",
    "roles_do_not_alternate": "paths in which prompter and assistant do not alternate",
}

Path = Sequence[TreeMessage]


def leaf_paths(root: TreeMessage) -> Iterator[list[TreeMessage]]:
    """Every path from the root to a message without replies, depth first in export order."""
    path: list[TreeMessage] = []
    open_messages = [(root, 0)]
    while open_messages:
        message, depth = open_messages.pop()
        del path[depth:]
        path.append(message)
        if not message.replies:
            yield list(path)
        open_messages.extend((reply, depth + 1) for reply in reversed(message.replies))


def without_open_turn(path: Path) -> Path:
    """The path without a user turn at its end, which nobody answered."""
    return path[:-1] if path[-1].role == "prompter" else path


def broken_rule(path: Path, top_k: int | None) -> PathRule | None:
    """The first rule that a root-to-leaf path breaks, None if it becomes a dialogue."""
    if len(path) == 1:
        return "prompt_without_reply"
    if any(message.deleted for message in path):
        return "path_with_deleted_message"
    if any(message.synthetic for message in path):
        return "path_with_synthetic_message"
    # Of several open questions below one answer, one stands for the dialogue that ends there.
    if path[-1].role == "prompter" and path[-2].replies[0] is not path[-1]:
        return "open_turn_that_is_not_the_first_reply"
    if top_k is not None and not _within_top(path, top_k):
        return "reply_ranked_below_top_k"
    if not alternates(without_open_turn(path)):
        return "roles_do_not_alternate"
    return None


def alternates(path: Path) -> bool:
    """Whether the path goes prompter, assistant, prompter, … and ends with an assistant."""
    roles = ("prompter", "assistant")
    return len(path) % 2 == 0 and all(message.role == roles[i % 2] for i, message in enumerate(path))


def _within_top(path: Path, top_k: int) -> bool:
    for parent, message in pairwise(path):
        if message.role != "assistant":
            continue
        if message.rank is None:
            if len(parent.replies) > 1:
                return False
        elif message.rank >= top_k:
            return False
    return True
