"""Records of chat APIs: requests beside their responses, and items of OpenAI's Responses API, as `messages`.

Logs of gateways, batch files and traces keep what was sent and what came back in two objects. The fields that say what
was asked and answered are taken out of them; what is left is kept in two columns.

Sources: https://platform.openai.com/docs/api-reference/chat, https://platform.openai.com/docs/api-reference/responses,
https://platform.openai.com/docs/guides/batch, https://docs.smith.langchain.com
"""

from collections.abc import Mapping, Sequence
from typing import Any

from peftchat.conversations.formats import names
from peftchat.conversations.formats.fields import Fields, parse_text
from peftchat.conversations.formats.keys import CHOICES

_REQUEST = ("request", "request_body", "requestBody", "inputs", "body")
_RESPONSE = ("response", "response_body", "responseBody", "outputs")
_REST_OF_REQUEST, _REST_OF_RESPONSE = "request_parameters", "response_metadata"
_ITEMS = frozenset({"message", "reasoning", "function_call", "function_call_output"})

API_FIELDS = frozenset({*_REQUEST, *_RESPONSE, "output"})
"""Fields of which a record of an API has at least one."""


def of_api(fields: Fields) -> Fields:
    """Return a record of a chat API with its turns in `messages`; any other record as it is."""
    flat = _of_exchange(fields)
    return _of_items(flat) if _has_items(flat) else flat


def _of_exchange(fields: Fields) -> Fields:
    """The request's fields that say what is asked, and the response's answer, in one record."""
    request, response = _find(fields, _REQUEST), _find(fields, _RESPONSE)
    if response is None or (request is None and "messages" not in fields and "input" not in fields):
        return fields
    answer = _answer_of(response[1])
    if request is None and (_is_answered(fields) or not any(answer.get(name) for name in _ANSWERING)):
        return fields  # a column of that name
    record = {name: value for name, value in fields.items() if name not in (request and request[0], response[0])}
    found = {} if request is None else _told_apart(request[1], _ASKING, _REST_OF_REQUEST)
    found |= answer
    # A field beside them by the same name, unless it is a copy, is no part of the exchange: it is kept and told.
    beside = {f"outer_{name}": record[name] for name in record.keys() & found if record[name] != found[name]}
    return {**record, **found, **dict(sorted(beside.items()))}


def _is_answered(fields: Fields) -> bool:
    """Whether the `messages` of a record end with a turn of the model."""
    turns = fields.get("messages")
    last = turns[-1] if isinstance(turns, list) and turns else None
    return isinstance(last, dict) and names.ROLES.get(names.normalize_role(str(last.get("role")))) == "assistant"


def _find(fields: Fields, known: Sequence[str]) -> tuple[str, dict[str, Any]] | None:
    """The first field that holds an object, also as JSON text, and the object."""
    for name in known:
        value = fields.get(name)
        if isinstance(value, str) and value.lstrip().startswith("{"):
            try:
                value = parse_text(value)
            except ValueError:
                continue
        if isinstance(value, dict):
            return name, value
    return None


_ASKING = frozenset({"messages", "input", "instructions", *names.TOOLS, *names.SYSTEM, *names.ASKED})
_ANSWERING = frozenset({CHOICES, "output", *names.ANSWERED})


def _told_apart(fields: Fields, wanted: frozenset[str], rest: str) -> dict[str, Any]:
    """The wanted fields, and all others below one name."""
    others = {name: value for name, value in fields.items() if name not in wanted}
    return {**{name: value for name, value in fields.items() if name in wanted}, **({rest: others} if others else {})}


def _answer_of(response: Fields) -> dict[str, Any]:
    """The answer in a response: `choices`, items of `output`, one message, or text."""
    body = response.get("body")
    if isinstance(body, dict):  # the Batch API
        return _answer_of({**{name: value for name, value in response.items() if name != "body"}, **body})
    if isinstance(message := response.get("message"), dict):
        return _choice(message, {name: value for name, value in response.items() if name != "message"})
    if "content" in response:  # a message, as Anthropic's API answers with
        message = {name: response[name] for name in _OF_MESSAGE if name in response}
        rest = {name: value for name, value in response.items() if name not in message}
        return _choice(message, rest, "length" if response.get("stop_reason") == "max_tokens" else None)
    return _told_apart(response, _ANSWERING, _REST_OF_RESPONSE)


_OF_MESSAGE = ("role", "content", "tool_calls", *names.REASONING)


def _choice(message: Fields, rest: Fields, finish_reason: str | None = None) -> dict[str, Any]:
    """A message as the only one of `choices`."""
    choice = {"message": message, "finish_reason": finish_reason or rest.get("done_reason")}
    return {CHOICES: [choice], **({_REST_OF_RESPONSE: rest} if rest else {})}


def _has_items(fields: Fields) -> bool:
    output = fields.get("output")
    if not isinstance(fields.get("input", ""), str | list):
        return False
    return isinstance(output, list) and any(
        isinstance(item, dict) and str(item.get("type")) in _ITEMS for item in output
    )


def _of_items(fields: Fields) -> Fields:
    """A record whose `input` and `output` are items of the Responses API, with turns instead."""
    asked = fields.get("input", [])
    items = [{"role": "user", "content": asked}] if isinstance(asked, str) else list(asked)
    turns: list[dict[str, Any]] = []
    for item in [*items, *fields["output"]]:
        _add(item if isinstance(item, dict) else {"content": item}, turns)
    record = {name: value for name, value in fields.items() if name not in ("input", "output", "instructions")}
    system = {"system": fields["instructions"]} if fields.get("instructions") else {}
    if any(isinstance(item, dict) and item.get("status") == "incomplete" for item in fields["output"]):
        return {**record, **system, "messages": turns[:-1], **_choice(turns[-1], {}, "length")}
    return {**record, **system, "messages": turns}


def _add(item: Mapping[str, Any], turns: list[dict[str, Any]]) -> None:
    """Add an item to the turns: what the model does between two messages of others is one turn.

    Fields that a turn has not stay in it, where the reader of turns tells or refuses them.
    """
    kind = item.get("type", "message")
    if kind == "function_call_output":
        turns.append({"role": "tool", **_renamed(item, {"call_id": "tool_call_id", "output": "content"})})
    elif kind == "message":
        said = _renamed(item, {})
        last = turns[-1] if turns else {}
        if said.get("role") == last.get("role") == "assistant" and not last.get("content"):
            last.update(said)
        else:
            turns.append(said)
    elif kind == "function_call":
        function = {name: item[name] for name in ("name", "arguments") if name in item}
        rest = {name: value for name, value in item.items() if name not in function}
        call = {**_renamed(rest, {"id": "item_id", "call_id": "id"}), "type": "function", "function": function}
        _assistant(turns).setdefault("tool_calls", []).append(call)
    elif kind == "reasoning":
        thought, name = _thought(item)
        rest = {other: value for other, value in item.items() if other not in ("type", "id", name)}
        _assistant(turns).update({"reasoning_content": thought} if thought else {}, **rest)
    else:
        turns.append({"role": "assistant", "content": [item]})  # refused as a part that is not text


def _renamed(item: Mapping[str, Any], new: Mapping[str, str]) -> dict[str, Any]:
    """The fields of an item besides its type, some under new names."""
    return {new.get(name, name): value for name, value in item.items() if name != "type"}


def _assistant(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """The turn of the model at the end, begun if there is none."""
    if not turns or turns[-1].get("role") != "assistant":
        turns.append({"role": "assistant", "content": ""})
    return turns[-1]


def _thought(item: Mapping[str, Any]) -> tuple[str, str]:
    """The text of a reasoning item, and the field that holds it; "" where it is encrypted."""
    for name in ("content", "summary"):
        parts = item.get(name)
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            continue
        texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
        if texts and all(part.keys() <= {"type", "text"} for part in parts):
            return "\n".join(texts), name
    return "", ""
