"""What several tests of reading conversations need."""

from collections.abc import Iterable

from peftchat.conversation import Conversation
from peftchat.conversations import fit_split


def split_eval(
    conversations: Iterable[Conversation], fraction: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """The training and the held-out conversations, as `data.eval_fraction` makes them."""
    kept = list(conversations)
    split = fit_split(kept, fraction, seed)
    return [one for one in kept if not split.is_eval(one)], [one for one in kept if split.is_eval(one)]
