"""OpenAssistant's rules against a slow second implementation, on real trees and on random ones."""

import gzip
import itertools
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftchat.conversations import ProblemLog, ReadOptions, read_conversations
from peftchat.conversations.formats.oasst import RULES
from peftchat.errors import UserError
from tests.support.splitting import split_eval

Tree = dict[str, Any]
Turns = tuple[tuple[str, str], ...]
TOP_K = (None, 1, 2, 3)


def oracle(trees: list[Tree], languages: tuple[str, ...], top_k: int | None) -> list[Turns]:
    """The rules written down a second time: recursive, on the raw JSON, one condition after the other."""
    conversations: list[Turns] = []

    def visit(node: Tree, above: list[Tree]) -> None:
        path = [*above, node]
        replies = node.get("replies") or []
        for reply in replies:
            visit(reply, path)
        if not replies and accepted(path):
            kept = path[:-1] if node["role"] == "prompter" else path
            roles = [message["role"] for message in kept]
            if roles == ["prompter", "assistant"] * (len(kept) // 2):
                names = {"prompter": "user", "assistant": "assistant"}
                conversations.append(tuple((names[message["role"]], message["text"]) for message in kept))

    def accepted(path: list[Tree]) -> bool:
        leaf = path[-1]
        if len(path) < 2 or any(message.get("deleted") or message.get("synthetic") for message in path):
            return False
        if leaf["role"] == "prompter" and path[-2]["replies"][0]["message_id"] != leaf["message_id"]:
            return False
        if top_k is None:
            return True
        for parent, message in itertools.pairwise(path):
            rank = message.get("rank")
            if message["role"] == "assistant":
                if rank is None and len(parent["replies"]) > 1:
                    return False
                if rank is not None and not rank < top_k:
                    return False
        return True

    for tree in trees:
        prompt = tree["prompt"]
        if tree.get("tree_state") != "ready_for_export" or prompt.get("review_result") is not True:
            continue
        if languages and prompt["lang"] not in languages:
            continue
        visit(prompt, [])
    return list(dict.fromkeys(conversations))


def read(path: Path, languages: tuple[str, ...] = (), top_k: int | None = None, **options: Any) -> list[Turns]:
    stream = read_conversations(
        path, format="oasst", options=ReadOptions(languages=languages, oasst_top_k=top_k), **options
    )
    return [tuple((message.role, message.content) for message in found.messages) for found in stream]


def write_trees(path: Path, trees: list[Tree]) -> Path:
    lines = "".join(json.dumps(tree) + "\n" for tree in trees).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


def messages_of(tree: Tree) -> Iterator[Tree]:
    def visit(node: Tree, parent: str | None) -> Iterator[Tree]:
        own = {name: value for name, value in node.items() if name != "replies"}
        yield {**own, "parent_id": parent, "tree_state": tree["tree_state"], "message_tree_id": tree["message_tree_id"]}
        for reply in node.get("replies") or []:
            yield from visit(reply, node["message_id"])

    return visit(tree["prompt"], None)


@pytest.fixture
def real_trees(shared_data: Path) -> list[Tree]:
    lines = (shared_data / "oasst_trees_en_60.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(("top_k", "threads"), zip(TOP_K, (312, 57, 165, 276), strict=True))
def test_real_trees_give_the_oracles_conversations(
    shared_data: Path, real_trees: list[Tree], top_k: int | None, threads: int
) -> None:
    found = read(shared_data / "oasst_trees_en_60.jsonl", ("en",), top_k)
    assert Counter(found) == Counter(oracle(real_trees, ("en",), top_k))
    assert len(found) == threads


def test_tree_flat_and_packed_exports_give_the_same(tmp_path: Path, real_trees: list[Tree]) -> None:
    trees = write_trees(tmp_path / "a.trees.jsonl.gz", real_trees)
    flat = [message for tree in real_trees for message in messages_of(tree)]
    in_order = write_trees(tmp_path / "a.messages.jsonl", flat)
    assert read(in_order) == read(trees)
    # Replies before their parents; siblings keep their order, which decides which open turn counts.
    parents_last = [message for tree in real_trees for message in sorted(messages_of(tree), key=_is_root)]
    assert Counter(read(write_trees(tmp_path / "b.messages.jsonl", parents_last))) == Counter(read(trees))


def _is_root(message: Tree) -> bool:
    return message["parent_id"] is None


def test_a_thread_export_gives_its_threads(tmp_path: Path, real_trees: list[Tree]) -> None:
    threads: list[list[Tree]] = []

    def visit(node: Tree, above: list[Tree]) -> None:
        path = [*above, {name: value for name, value in node.items() if name != "replies"}]
        if not node["replies"]:
            threads.append(path)
        for reply in node["replies"]:
            visit(reply, path)

    for tree in real_trees:
        visit(tree["prompt"], [])
    names = {"prompter": "user", "assistant": "assistant"}
    by_people = [path for path in threads if not any(message["synthetic"] for message in path)]
    answered = [path if path[-1]["role"] == "assistant" else path[:-1] for path in by_people]
    expected = {tuple((names[message["role"]], message["text"]) for message in path) for path in answered}
    rows = [{"thread_id": path[-1]["message_id"], "thread": path} for path in threads]
    found = read(write_trees(tmp_path / "a.jsonl", rows))
    assert set(found) == expected
    assert len(found) == len(expected) > 300


def test_every_path_is_counted_once(shared_data: Path) -> None:
    for top_k in TOP_K:
        log = ProblemLog(strict=True)
        found = read(shared_data / "oasst_trees_en_60.jsonl", ("en",), top_k, problems=log)
        path_rules = [rule for rule in log.skipped if rule != "duplicate"]
        assert set(path_rules) <= set(RULES)
        assert log.notes["oasst_paths"] == len(found) + log.skipped.total()


def message(role: str, text: str, replies: list[Tree], **fields: Any) -> Tree:
    return {"message_id": text, "role": role, "text": text, "lang": "en", "replies": replies, **fields}


def tree_of(prompt: Tree, state: str | None = "ready_for_export") -> Tree:
    return {"message_tree_id": prompt["message_id"], "tree_state": state, "prompt": {"review_result": True, **prompt}}


ANSWERED = message("prompter", "q", [message("assistant", "a", [])])


@pytest.mark.parametrize(
    ("tree", "languages", "rule"),
    [
        (tree_of(ANSWERED, "growing"), (), "tree_not_ready"),
        (tree_of(ANSWERED, None), (), "tree_not_ready"),
        (tree_of({**ANSWERED, "review_result": False}), (), "prompt_not_reviewed"),
        (tree_of({**ANSWERED, "review_result": None}), (), "prompt_not_reviewed"),
        (tree_of({**ANSWERED, "lang": "es"}), ("en", "de"), "prompt_in_other_language"),
        (tree_of({**ANSWERED, "lang": "end"}), ("en",), "prompt_in_other_language"),
        (tree_of(message("prompter", "q", [])), (), "prompt_without_reply"),
        (
            tree_of(message("prompter", "q", [message("assistant", "a", [], deleted=True)])),
            (),
            "path_with_deleted_message",
        ),
        (
            tree_of(message("prompter", "q", [message("assistant", "a", [], synthetic=True)])),
            (),
            "path_with_synthetic_message",
        ),
        (tree_of(message("prompter", "q", [message("prompter", "q2", [])])), (), "roles_do_not_alternate"),
    ],
)
def test_each_rule_leaves_out_and_counts(tmp_path: Path, tree: Tree, languages: tuple[str, ...], rule: str) -> None:
    log = ProblemLog(strict=True)
    good = tree_of(message("prompter", "good question", [message("assistant", "good answer", [])], lang="en-GB"))
    path = write_trees(tmp_path / "a.jsonl", [tree, good])
    assert read(path, languages, problems=log) == [(("user", "good question"), ("assistant", "good answer"))]
    assert dict(log.skipped) == {rule: 1}


def test_of_several_open_turns_one_stands_for_the_conversation(tmp_path: Path) -> None:
    def conversation(*replies: Tree) -> Tree:
        return tree_of(message("prompter", "q", [message("assistant", "a", list(replies))]))

    follow_up = message("prompter", "q2", [message("assistant", "a2", [])])
    open_turns = [message("prompter", "x", []), message("prompter", "y", [])]
    short, long = (
        (("user", "q"), ("assistant", "a")),
        (("user", "q"), ("assistant", "a"), ("user", "q2"), ("assistant", "a2")),
    )
    assert read(write_trees(tmp_path / "a.jsonl", [conversation(*open_turns)])) == [short]
    assert read(write_trees(tmp_path / "b.jsonl", [conversation(*open_turns, follow_up)])) == [short, long]
    assert read(write_trees(tmp_path / "c.jsonl", [conversation(follow_up, *open_turns)])) == [long]


def test_equal_conversations_of_two_trees_are_given_once(tmp_path: Path) -> None:
    log = ProblemLog()
    assert len(read(write_trees(tmp_path / "a.jsonl", [tree_of(ANSWERED)] * 3), problems=log)) == 1
    assert log.skipped["duplicate"] == 2


def test_lost_and_circular_messages_are_problems_of_their_own(tmp_path: Path) -> None:
    flat = [
        {"message_id": "1", "parent_id": None, "text": "q", "role": "prompter"},
        {"message_id": "2", "parent_id": "1", "text": "a", "role": "assistant"},
        {"message_id": "2", "parent_id": "1", "text": "again", "role": "assistant"},
        {"message_id": "3", "parent_id": "lost", "text": "b", "role": "assistant"},
        {"message_id": "4", "parent_id": "5", "text": "c", "role": "assistant"},
        {"message_id": "5", "parent_id": "4", "text": "d", "role": "prompter"},
    ]
    path = write_trees(tmp_path / "a.jsonl", flat)
    log = ProblemLog()
    assert read(path, problems=log) == [(("user", "q"), ("assistant", "a"))]
    assert dict(log.problems) == {"broken_tree": 4}
    with pytest.raises(UserError, match=r":3: message id '2' was there before"):
        read(path)


def test_no_root_prompt_is_on_both_sides_of_a_split(shared_data: Path) -> None:
    everything = list(read_conversations(shared_data / "oasst_trees_en_60.jsonl"))
    for seed in range(5):
        train, held_out = split_eval(everything, 0.1, seed)
        roots = [{conversation.messages[0].content for conversation in side} for side in (train, held_out)]
        assert held_out
        assert not roots[0] & roots[1]
        assert len(train) + len(held_out) == len(everything)


@st.composite
def random_tree(draw: st.DrawFn) -> Tree:
    """A tree in which every rule has something to bite on, in the shape of an export."""
    dice = random.Random(draw(st.integers(0, 2**32)))
    numbers = itertools.count()

    def grow(role: str, depth: int) -> Tree:
        replies = dice.choice((0, 1, 2, 3)) if depth < 5 else 0
        other = "assistant" if role == "prompter" else "prompter"
        return {
            "message_id": str(next(numbers)),
            "text": dice.choice("abcdefgh"),
            "role": role,
            "lang": dice.choice(("en", "en", "de")),
            "review_result": dice.random() > 0.1,
            "deleted": dice.random() < 0.05,
            "synthetic": dice.random() < 0.05,
            **({"rank": dice.choice((0, 1, 2, None))} if dice.random() < 0.9 else {}),
            "replies": [grow(role if dice.random() < 0.03 else other, depth + 1) for _ in range(replies)],
        }

    state = dice.choice(("ready_for_export", "ready_for_export", "ready_for_export", "ranking", None))
    return {"message_tree_id": "t", "tree_state": state, "prompt": grow("prompter", 0)}


@settings(max_examples=150, deadline=None)
@given(trees=st.lists(random_tree(), min_size=1, max_size=3), top_k=st.sampled_from(TOP_K))
def test_random_trees_give_the_oracles_conversations(
    tmp_path_factory: Any, trees: list[Tree], top_k: int | None
) -> None:
    path = write_trees(tmp_path_factory.mktemp("trees") / "a.jsonl", trees)
    log = ProblemLog(strict=True)
    found = read(path, ("en",), top_k, problems=log)
    assert Counter(found) == Counter(oracle(trees, ("en",), top_k))
    left_out = sum(
        count for rule, count in log.skipped.items() if not rule.startswith(("tree", "prompt_not", "prompt_in"))
    )
    assert log.notes["oasst_paths"] == len(found) + left_out


@pytest.mark.parametrize("flat", [False, True])
def test_fields_of_trees_are_kept_told_or_honored(tmp_path: Path, flat: bool) -> None:
    answer = {"message_id": "b", "text": "Hello", "role": "assistant", "labels": {"quality": 1}, "train": False}
    prompt = {"message_id": "a", "text": "Hi", "role": "prompter", "lang": "en", "review_result": True, "user_id": "u"}
    tree = {"message_tree_id": "a", "tree_state": "ready_for_export"}
    rows = [{**tree, "origin": "x", "notes": "n", "prompt": {**prompt, "replies": [answer]}}]
    if flat:
        rows = [{**tree, **prompt}, {**tree, **answer, "parent_id": "a"}]
    path = tmp_path / "trees.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    log = ProblemLog(strict=True)
    (one,) = read_conversations(path, problems=log)
    assert [message.train for message in one.messages] == [None, False]
    assert one.columns == {"lang": "en", **({} if flat else {**tree, "origin": "x", "notes": "n"})}
    assert {"user_id in a message", "labels in a message"} <= log.unused.keys()
    assert not any("train" in name for name in log.unused)
