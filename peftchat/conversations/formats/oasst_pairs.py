"""Preference pairs of an OpenAssistant tree: which of the ranked replies to one prompt are compared.

People ranked the replies to a prompt, 0 the best. InstructGPT makes all pairs of such a ranking (Ouyang et al., 2022,
https://arxiv.org/abs/2203.02155); the best reply against the worst is the pair on which people agree most.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise
from typing import Literal

from peftchat.conversation import RankPairs
from peftchat.conversations.formats.oasst_trees import TreeMessage, all_paths, within_top

PairRule = Literal[
    "prompt_with_deleted_message",
    "prompt_with_synthetic_message",
    "prompt_behind_reply_below_top_k",
    "prompt_with_other_roles",
    "prompt_without_ranked_replies",
    "replies_of_equal_text",
]

PAIR_RULES: dict[PairRule, str] = {
    "prompt_with_deleted_message": "prompts with a deleted message in what leads to them",
    "prompt_with_synthetic_message": "prompts with a message written by a model in what leads to them",
    "prompt_behind_reply_below_top_k": "prompts behind a reply ranked below top_k, or unranked among siblings",
    "prompt_with_other_roles": "prompts at which prompter and assistant do not alternate",
    "prompt_without_ranked_replies": "prompts with fewer than two replies of different rank, written by people",
    "replies_of_equal_text": "pairs of replies with the same text",
}


def paths_to_prompts(root: TreeMessage) -> Iterator[list[TreeMessage]]:
    """Every path from the root to a prompter's message that has replies, depth first in export order."""
    for path in all_paths(root):
        if path[-1].role == "prompter" and path[-1].replies:
            yield path


def broken_prompt_rule(path: Sequence[TreeMessage], top_k: int | None) -> PairRule | None:
    """The first rule that a path to a prompt breaks, None if its replies can be compared."""
    if any(message.deleted for message in path):
        return "prompt_with_deleted_message"
    if any(message.synthetic for message in path):
        return "prompt_with_synthetic_message"
    if top_k is not None and not within_top(path, top_k):
        return "prompt_behind_reply_below_top_k"
    roles = ("prompter", "assistant")
    if any(message.role != roles[place % 2] for place, message in enumerate(path)):
        return "prompt_with_other_roles"
    return None


def ranked_pairs(
    prompt: TreeMessage, rule: RankPairs, top_k: int | None = None
) -> list[tuple[TreeMessage, TreeMessage]]:
    """The pairs of a prompt's replies: chosen, rejected.

    Compared are the answers that people wrote and ranked. Of those with one rank none is better, and they are no pair.

    Args:
        prompt: a prompter's message.
        rule: `best_worst` gives the best and the worst, `adjacent` each reply and the next one, `all` every two.
        top_k: a chosen reply is among the best `top_k`; None allows all.
    """
    answers = [reply for reply in prompt.replies if reply.role == "assistant"]
    by_people = [reply for reply in answers if not (reply.deleted or reply.synthetic)]
    ranked = [(reply.rank, reply) for reply in by_people if reply.rank is not None]
    ranked.sort(key=lambda one: one[0])
    if rule == "best_worst":
        found = [(ranked[0], ranked[-1])] if ranked else []
    else:
        found = list(pairwise(ranked) if rule == "adjacent" else combinations(ranked, 2))
    return [
        (chosen, rejected)
        for (better, chosen), (worse, rejected) in found
        if better < worse and (top_k is None or better < top_k)
    ]
