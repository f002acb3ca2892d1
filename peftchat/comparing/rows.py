"""The dialogues of a comparison, written down once: every run trains on the same rows and is judged by the same."""

from typing import TYPE_CHECKING

from peftchat.comparing.folder import ComparisonFolder
from peftchat.conversations.dataset_card import SplitCount
from peftchat.conversations.prepare import ConversationFile, atomic_directory
from peftchat.conversations.problems import ProblemLog
from peftchat.dataset.cache import conversations
from peftchat.errors import UserError

if TYPE_CHECKING:
    from peftchat.recipe import Recipe


def settle_rows(recipe: "Recipe", folder: ComparisonFolder) -> None:
    """Write both sides of the recipe's data into the folder, unless they lie there.

    A recipe that holds out a share of its rows chooses them by its seed, which differs between the runs.

    Raises:
        InputError: a source cannot be read, or leaves one side empty.
    """
    if folder.data.is_dir():
        return
    with atomic_directory(folder.data) as draft:
        for side in ("train", "eval"):
            count = SplitCount()
            with ConversationFile(draft / f"{side}.jsonl", count) as file:
                for conversation in conversations(recipe, side, ProblemLog(strict=True)):
                    file.write(conversation)
            if not count.dialogues:
                raise UserError(f"no dialogue is left to {'train' if side == 'train' else 'evaluate'} on", where="data")


def first_questions(folder: ComparisonFolder, count: int) -> list[str]:
    """The first user message of the first held-out dialogues, none twice."""
    from peftchat.conversations import read_conversations

    found: dict[str, None] = {}
    for conversation in read_conversations(str(folder.data / "eval.jsonl"), format="messages"):
        if len(found) >= count:
            break
        first = next((message.content for message in conversation.messages if message.role == "user"), "")
        if first.strip() and len(first) <= _LONGEST:
            found[first] = None
    return list(found)[:count]


_LONGEST = 600
"""Characters of a question that still suits a table."""
