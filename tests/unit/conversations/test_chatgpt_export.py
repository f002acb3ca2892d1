"""ChatGPT's data export: the branch shown last, and what is not text."""

import json
from pathlib import Path
from typing import Any

import pytest

from peftchat.conversations import ProblemLog, read_conversations


def node(parent: str | None, role: str | None = None, *parts: Any, **message: Any) -> dict[str, Any]:
    content = {"content_type": "text", "parts": list(parts)}
    body = None if role is None else {"author": {"role": role}, "content": content, "recipient": "all", **message}
    return {"parent": parent, "message": body}


def conversation(**nodes: dict[str, Any]) -> dict[str, Any]:
    """An export's record: two empty nodes as ChatGPT writes them, then `nodes`, the last of which is shown."""
    first = {"root": node(None), "system": node("root", "system", "")}
    return {"title": "t", "mapping": {**first, **nodes}, "current_node": list(nodes)[-1]}


def read(folder: Path, *records: dict[str, Any]) -> tuple[list[list[tuple[str, str]]], ProblemLog]:
    path = folder / "conversations.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    log = ProblemLog()
    found = read_conversations(path, problems=log)
    return [[(message.role, message.content) for message in one.messages] for one in found], log


def test_the_branch_shown_last_is_read(tmp_path: Path) -> None:
    edited = conversation(
        first=node("system", "user", "Hi"),
        old=node("first", "assistant", "Hello."),
        hidden=node("first", "user", "profile", metadata={"is_visually_hidden_from_conversation": True}),
        new=node("hidden", "assistant", "Good ", "day."),
    )
    instructed = conversation(
        rules=node("system", "system", "Be brief."),
        ask=node("rules", "user", "2+2?"),
        say=node("ask", "assistant", "4"),
    )
    found, log = read(tmp_path, edited, instructed)
    assert found == [
        [("user", "Hi"), ("assistant", "Good day.")],
        [("system", "Be brief."), ("user", "2+2?"), ("assistant", "4")],
    ]
    assert log.formats == {str(tmp_path / "conversations.json"): "chatgpt_export"} and not log.total


ASK = node("system", "user", "Draw a cat.")
PICTURE = {"content": {"content_type": "multimodal_text", "parts": [{"asset_pointer": "x"}]}}


@pytest.mark.parametrize(
    ("nodes", "kind", "detail"),
    [
        (
            {"a": ASK, "b": node("a", "assistant", "", **PICTURE)},
            "unsupported_content",
            "'multimodal_text' is not text",
        ),
        ({"a": ASK, "b": node("a", "assistant", "go", recipient="dalle")}, "unsupported_content", "uses a tool"),
        ({"a": ASK, "b": node("a", "tool", "done")}, "unsupported_content", "uses a tool"),
        ({"a": ASK, "b": node("a", "critic", "good")}, "unknown_role", "'critic'"),
        ({"a": ASK, "b": node("gone", "assistant", "Ok.")}, "broken_tree", "'gone' is missing"),
        ({"a": node("b", "user", "x"), "b": node("a", "assistant", "y")}, "broken_tree", "is in a circle"),
        ({"a": ASK}, "no_answer", "no assistant message"),
    ],
)
def test_what_is_not_a_text_conversation_is_counted(
    tmp_path: Path, nodes: dict[str, Any], kind: str, detail: str
) -> None:
    found, log = read(tmp_path, conversation(**nodes))
    assert (found, dict(log.problems)) == ([], {kind: 1})
    assert log.first is not None and detail in log.first.detail


def test_what_is_left_of_an_export_is_kept_or_told(tmp_path: Path) -> None:
    record = conversation(
        ask=node("system", "user", "Hi", status="finished"),
        old=node("ask", "assistant", "Hello."),
        bad=node("ask", "assistant", "Go away.", weight=0),
        more=node("bad", "user", "Please?", metadata={"attachments": ["a.pdf"]}),
        hidden=node("more", "user", "profile", metadata={"is_visually_hidden_from_conversation": True}),
        say=node("hidden", "assistant", "Fine.", weight=1.0),
    )
    path = tmp_path / "conversations.json"
    path.write_text(json.dumps([{**record, "gizmo_id": "g-1"}]))
    log = ProblemLog()
    (one,) = read_conversations(path, problems=log)
    assert [message.train for message in one.messages] == [None, False, None, None]
    assert one.columns == {"title": "t", "gizmo_id": "g-1"}
    assert log.unused.keys() == {
        "status in a message",
        "metadata in a message",
        "mapping: hidden messages",
        "mapping: messages of other branches",
    }
