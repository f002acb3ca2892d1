"""Pairs of OpenAssistant's ranks against a slow second implementation, on real trees and on one with every case."""

import json
from pathlib import Path
from typing import Any

import pytest

from peftchat.conversation import RankPairs
from peftchat.conversations import ProblemLog, ReadOptions, read_conversations
from peftchat.conversations.prepare import PrepareOptions, prepare
from peftchat.errors import UserError
from tests.support.splitting import split_eval

Tree = dict[str, Any]
Pair = tuple[tuple[str, ...], str, str]
"""The texts that lead to the answers, the chosen one, the rejected one."""


def oracle(prompt: Tree, rule: RankPairs, top_k: int | None) -> set[Pair]:
    """The rule written down a second time: recursive, on the raw JSON."""
    found: set[Pair] = set()

    def visit(node: Tree, above: tuple[str, ...], usable: bool) -> None:
        usable = usable and not node.get("deleted") and not node.get("synthetic")
        if node["role"] == "prompter" and usable:
            answers = [one for one in node["replies"] if one["role"] == "assistant" and one.get("rank") is not None]
            answers = [one for one in answers if not one.get("deleted") and not one.get("synthetic")]
            ranks = sorted(one["rank"] for one in answers)
            for better in answers:
                for worse in answers:
                    is_pair = better["rank"] < worse["rank"] and better["text"] != worse["text"]
                    if rule == "best_worst":
                        is_pair &= better["rank"] == ranks[0] and worse["rank"] == ranks[-1]
                    elif rule == "adjacent":
                        is_pair &= not any(better["rank"] < rank < worse["rank"] for rank in ranks)
                    if is_pair and (top_k is None or better["rank"] < top_k):
                        found.add(((*above, node["text"]), better["text"], worse["text"]))
        for reply in node["replies"]:
            in_top = True
            if top_k is not None and reply["role"] == "assistant":
                in_top = reply["rank"] < top_k if reply.get("rank") is not None else len(node["replies"]) == 1
            visit(reply, (*above, node["text"]), usable and in_top)

    visit(prompt, (), usable=True)
    return found


def read(path: Path, rule: RankPairs | None, top_k: int | None = None, log: ProblemLog | None = None) -> list[Pair]:
    options = ReadOptions(pairs=True, oasst_pairs=rule, oasst_top_k=top_k)
    found = []
    for pair in read_conversations(path, problems=log, options=options):
        assert pair.rejected is not None and pair.messages[:-1] == pair.rejected[:-1]
        assert [message.role for message in pair.messages] == ["user", "assistant"] * (len(pair.messages) // 2)
        above = tuple(message.content for message in pair.messages[:-1])
        found.append((above, pair.messages[-1].content, pair.rejected[-1].content))
    return found


def answer(text: str, rank: float | None, *replies: Tree, **fields: Any) -> Tree:
    own = {"message_id": text, "text": text, "role": "assistant", "rank": rank}
    return {**own, "replies": list(replies), **fields}


def question(text: str, *replies: Tree, **fields: Any) -> Tree:
    return {"message_id": text, "text": text, "role": "prompter", "replies": list(replies), **fields}


EVERY_CASE = question(
    "q",
    answer("third", 2),
    answer("best", 0, question("q2", answer("x", 0), answer("y", 1), answer("no rank", None))),
    answer("tied", 2, question("q3", answer("z", 0), answer("w", 1))),
    answer("second", 1, question("below", answer("same", 0), answer("same", 1, message_id="same too"))),
    answer("gone", 3, deleted=True),
    answer("written by a model", 4, question("q4", answer("u", 0), answer("v", 1)), synthetic=True),
    question("a prompter's reply"),
)


def flat(node: Tree, parent: str | None = None) -> list[Tree]:
    own = {key: value for key, value in node.items() if key != "replies"}
    return [{**own, "parent_id": parent}, *(row for one in node["replies"] for row in flat(one, node["message_id"]))]


@pytest.mark.parametrize("top_k", [None, 1, 2])
@pytest.mark.parametrize("rule", ["best_worst", "adjacent", "all"])
def test_trees_give_the_oracles_pairs(tmp_path: Path, shared_data: Path, rule: RankPairs, top_k: int | None) -> None:
    real = shared_data / "oasst_trees_en_60.jsonl"
    trees = [json.loads(line)["prompt"] for line in real.read_text(encoding="utf-8").splitlines()]
    found = read(real, rule, top_k)
    assert sorted(found) == sorted(set().union(*(oracle(tree, rule, top_k) for tree in trees)))
    assert len(found) > 50
    made, single = tmp_path / "tree.jsonl", tmp_path / "flat.jsonl"
    made.write_text(json.dumps(
        {"message_tree_id": "t", "tree_state": "ready_for_export", "prompt": {**EVERY_CASE, "review_result": True}}
    ))  # fmt: skip
    # A reply may come before its parent, and a column of ranks with gaps is one of floats.
    rows = [{**row, "rank": None if row.get("rank") is None else float(row["rank"])} for row in flat(EVERY_CASE)]
    single.write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
    expected = oracle(EVERY_CASE, rule, top_k)
    if rule == "adjacent":
        # Which of two replies with one rank is the neighbor is settled by their order; no pair has both of them.
        assert {pair[1:] for pair in read(made, rule, top_k)} <= {pair[1:] for pair in expected}
        assert ("third", "tied") not in {pair[1:] for pair in expected}
    elif rule == "all":
        assert set(read(made, rule, top_k)) == set(read(single, rule, top_k)) == expected
    else:
        assert {pair[:2] for pair in read(made, rule, top_k)} == {pair[:2] for pair in expected}


def test_every_prompt_and_pair_is_counted(tmp_path: Path, shared_data: Path) -> None:
    made = tmp_path / "flat.jsonl"
    made.write_text("".join(json.dumps(row) + "\n" for row in flat(EVERY_CASE)))
    log = ProblemLog()
    assert len(read(made, None, log=log)) == len(read(made, "best_worst")) == 3
    assert log.skipped == {"prompt_with_synthetic_message": 1, "replies_of_equal_text": 1}
    assert (log.notes["oasst_prompts"], log.notes["oasst_pairs"]) == (5, 4)
    card = prepare(
        str(shared_data / "oasst_trees_en_60.jsonl"), tmp_path / "out", PrepareOptions(pairs=True, oasst_pairs="all")
    )
    written = [read(tmp_path / "out" / name, None) for name in ("train.jsonl", "eval.jsonl")]
    assert sum(map(len, written)) == card.train.conversations + card.eval.conversations
    assert card.oasst["oasst_pairs"] == sum(map(len, written)) + card.skipped.get("duplicate", 0)
    roots = [{above[0] for above, _, _ in side} for side in written]
    assert roots[0].isdisjoint(roots[1]) and all(roots)
    assert "| pairs of ranked replies to them | 430 |" in (tmp_path / "out" / "card.md").read_text()


def test_no_tree_is_on_both_sides_of_a_recipes_split(shared_data: Path) -> None:
    pairs = list(read_conversations(shared_data / "oasst_trees_en_60.jsonl", options=ReadOptions(pairs=True)))
    for seed in range(3):
        sides = split_eval(pairs, 0.2, seed)
        roots = [{pair.messages[0].content for pair in side} for side in sides]
        assert roots[0].isdisjoint(roots[1]) and all(roots)


def test_what_has_no_ranked_replies_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"thread_id": "t", "thread": flat(question("q", answer("a", 0)))}) + "\n")
    with pytest.raises(UserError, match="a thread has one reply to each prompt"):
        read(path, None)
    path.write_text(json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}) + "\n")
    with pytest.raises(UserError, match="`oasst_pairs` chooses answers by rank, and the format `preference` has no"):
        read(path, "all")
