"""What is right for a template and a conversation, from `apply_chat_template` and the tokenizer alone.

It shares no code with peftchat. For each trained answer it renders the prompt (the messages before it, with
`add_generation_prompt`) and the text up to the answer, and takes the difference up to the token that ends the turn. It
also looks whether everything that the conversation says is in these texts, and says when a refusal is justified.

Where a recipe has settings, `with_settings` says what the record then is, from their description in docs/templates.md.

A record can be given to a template in several ways: a call's arguments as an object or as JSON text, no content as a
missing or an empty one. Every way counts in which the template writes no Python values.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from template_cases import Message, Record
from transformers import PreTrainedTokenizerFast

_WORD = re.compile(r"[^\W_]+")
_INLINE = re.compile(r"^\s*<think>(.*?)</think>", re.DOTALL)
_TAG = re.compile(r"</?[\w:]+>")
# A block of reasoning that the prompt opens and closes, and what opens or closes one.
_CLOSED = re.compile(
    r"<([\w:]*think)>\s*</\1>|\[THINK\]\s*\[/THINK\]|<\|channel>\w*\s*<channel\|>"
    r"|<\|START_THINKING\|>\s*<\|END_THINKING\|>|</[\w:]*think>|<channel\|>|\s+"
)
_OPENS = re.compile(r"<[\w:]*think>|\[THINK\]|<\|channel>|<\|START_THINKING\|>|<\|think\|>|<\|inner_prefix\|>")
_CLOSES = re.compile(r"\s*(?:</[\w:]*think>|\[/THINK\]|<channel\|>|<\|END_THINKING\|>)")
_PROBE = "Zebra"


def _shared(one: str, other: str) -> str:
    """Return the beginning that two texts have in common."""
    length = next((index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    return min(one, other, key=len) if length is None else one[:length]


class RenderError(Exception):
    """The template raised an error."""


@dataclass(frozen=True)
class Target:
    """One way in which an answer may be trained.

    Attributes:
        prompt: the text before it.
        answer: the text to be trained.
        prompt_ids: ids of the prompt, as `apply_chat_template` gives them.
        answer_ids: ids of the answer, from its own first character.
        specials: how many of them may be special tokens of the template's. None where the ids themselves tell.
    """

    prompt: str
    answer: str
    prompt_ids: list[int]
    answer_ids: list[int]
    specials: frozenset[int] | None = None


@dataclass
class Answer:
    """What the oracle says of one trained answer.

    Attributes:
        index: the message's index.
        targets: ways in which it may be trained; none where only a refusal is right.
        required: whether a refusal is needless as far as this answer is concerned.
        optional: whether it may also stay untrained.
        reasons: why a refusal is justified, as (kind, details).
    """

    index: int
    targets: list[Target] = field(default_factory=list)
    required: bool = False
    optional: bool = False
    reasons: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Expectation:
    """What the oracle says of a record, given to the template in one way."""

    way: str
    answers: list[Answer]

    @property
    def possible(self) -> bool:
        return all(answer.targets or answer.optional for answer in self.answers)

    @property
    def required(self) -> bool:
        return all(answer.required or answer.optional for answer in self.answers)

    @property
    def reasons(self) -> list[tuple[str, str]]:
        return [reason for answer in self.answers for reason in answer.reasons]


def is_trained(message: Message) -> bool:
    return message["role"] == "assistant" and message.get("train") is not False and message.get("weight") != 0


class Oracle:
    """Stock transformers' view of one template.

    Args:
        tokenizer: with the template as `chat_template`; it is not changed.
        variables: further variables of the template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, variables: dict[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self._variables = variables or {}
        names = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.special = names | set(tokenizer.all_special_tokens)
        self.special_ids = set(tokenizer.convert_tokens_to_ids(sorted(self.special)))
        self._by_length = sorted(self.special, key=lambda token: (-len(token), token))
        by_length = list(map(re.escape, self._by_length))
        self._special = re.compile("|".join(by_length))
        self._gap = re.compile(rf"(?:{'|'.join(by_length)}|\s)*")
        self._group = re.compile(rf"(?:{'|'.join(by_length)})+")

    def render(self, messages: Sequence[Message], tools: list[Record] | None, prompt: bool = False) -> str:
        """Return the text of `apply_chat_template`.

        Raises:
            RenderError: the template cannot write it.
        """
        given: Any = [{key: value for key, value in one.items() if key not in ("train", "weight")} for one in messages]
        try:
            # transformers refuses no messages at all, and takes them in a batch.
            text = self.tokenizer.apply_chat_template(
                given or [[]], tools=tools, add_generation_prompt=prompt, tokenize=False, **self._variables
            )
        except Exception as error:  # a template is code: it may fail in any way
            raise RenderError(f"{type(error).__name__}: {error}") from error
        return text if given else text[0]

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def expectations(self, record: Record) -> list[Expectation]:
        """Return what is right, for each way in which the record can be given to the template."""
        twin = self._innocent(record)
        expected = self._expectations(record)
        if twin == record:
            return expected
        by_way = {other.way: other for other in self._expectations(twin)}
        for one in expected:
            for answer, clean in zip(one.answers, by_way[one.way].answers, strict=True):
                counts = frozenset(self.count_special(like.prompt_ids + like.answer_ids) for like in clean.targets)
                # What is spelled like a token may mislead the search for the turn's end; the twin's text cannot.
                like = [
                    replace(one, prompt=self._spelled(one.prompt), answer=self._spelled(one.answer))
                    for one in clean.targets
                ]
                answer.targets = [replace(target, specials=counts) for target in (*answer.targets, *like)]
                answer.required, answer.reasons = clean.required, clean.reasons
        return expected

    def count_special(self, ids: Sequence[int]) -> int:
        return sum(token in self.special_ids for token in ids)

    def _spelled(self, text: str) -> str:
        """Return an innocent text with the special tokens that its words stand for."""
        names = self._by_length
        return re.sub(r"Zq(\d+)q", lambda match: names[int(match[1])], text)

    def _innocent(self, record: Record) -> Record:
        """Return the record with words in place of contents' text that is spelled like a special token."""
        names = {token: f"Zq{number}q" for number, token in enumerate(self._by_length)}
        messages = []
        for message in record["messages"]:
            content = message.get("content")
            if isinstance(content, str) and self._special.search(content):
                message = {**message, "content": self._special.sub(lambda match: names[match.group()], content)}
            messages.append(message)
        return {**record, "messages": messages}

    def _expectations(self, record: Record) -> list[Expectation]:
        found = []
        for way, messages in _ways(record["messages"]):
            found.append(self._expect(way, messages, record.get("tools")))
        if not any(expected.required for expected in found):
            for way, messages in _other_ways(record["messages"]):
                other = self._expect(way, messages, record.get("tools"))
                for answer in other.answers:
                    answer.required = False
                if other.possible:
                    found.append(other)
        return found

    def _expect(self, way: str, messages: Sequence[Message], tools: list[Record] | None) -> Expectation:
        answers = [Answer(index) for index, message in enumerate(messages) if is_trained(message)]
        prompts: dict[int, str] = {}
        for answer in answers:
            self._expect_answer(answer, messages, tools, prompts)
        self._check_history(answers, messages, tools, prompts)
        return Expectation(way, answers)

    def _expect_answer(
        self, answer: Answer, messages: Sequence[Message], tools: list[Record] | None, prompts: dict[int, str]
    ) -> None:
        history, message = messages[: answer.index], messages[answer.index]
        # Where nothing was asked there is no prompt, so the answer may as well be taken as given.
        answer.optional = not any(one["role"] in ("user", "tool") for one in history)
        try:
            prompt = prompts[answer.index] = self.render(history, tools, prompt=True)
        except RenderError as error:
            answer.reasons.append(("raises", str(error)))
            return
        full = None
        try:
            full = self.render([*history, message], tools)
        except RenderError as error:
            answer.reasons.append(("raises", str(error)))
        if full is not None and (bad := _python_values(full, message)):
            answer.reasons.append(("python", bad))
            return
        followed = list(self._followed(messages, answer.index, tools))
        if full is not None and full.startswith(prompt):
            self._add_targets(answer, prompt, full[len(prompt) :], followed, message)
            answer.required = bool(answer.targets) and not answer.reasons
        elif full is not None:
            self._expect_moved(answer, prompt, full, followed, history, message)
        else:
            answer.targets += self._targets_from_followed(prompt, followed, message)

    def _followed(
        self, messages: Sequence[Message], index: int, tools: list[Record] | None
    ) -> Iterator[tuple[str, str]]:
        """Yield renderings that go on behind an answer, each with the next message's content."""
        message = messages[index]
        following = [messages[index + 1]] if index + 1 < len(messages) else []
        probes: list[list[Message]] = [following] if following else []
        if message.get("tool_calls"):
            results = [
                {"role": "tool", "tool_call_id": call["id"], "name": call["function"]["name"], "content": _PROBE}
                for call in message["tool_calls"]
            ]
            probes.append(results)
        else:
            probes.append([{"role": "user", "content": _PROBE}])
        for probe in probes:
            try:
                yield self.render([*messages[: index + 1], *probe], tools), str(probe[0]["content"])
            except RenderError:
                continue

    def _add_targets(
        self, answer: Answer, prompt: str, rest: str, followed: list[tuple[str, str]], message: Message
    ) -> None:
        """Add the answer behind the prompt, cut at each place that may be its end."""
        lost = _lost(_said(message), rest)
        if lost:
            answer.reasons.append(("lost", f"answer {answer.index}: {' '.join(lost)}"))
            return
        ends = self._ends(rest, followed)
        if not ends:
            answer.reasons.append(("no end", repr(rest[-30:])))
            ends = [rest.rstrip() + self.tokenizer.eos_token, rest + self.tokenizer.eos_token]
        answer.targets += [self._target(prompt, text) for text in ends]

    def _target(self, prompt: str, text: str) -> Target:
        return Target(prompt, text, self.ids(prompt), self.ids(text))

    def _ends(self, rest: str, followed: list[tuple[str, str]]) -> list[str]:
        """Return the text up to and with what ends it, in each form that is right."""
        tail = self._tail_of(rest)
        body = rest[: len(rest) - len(tail)]
        after = [found for text, content in followed if (found := self._gap_behind(body, text, content)) is not None]
        if self._special.search(tail) is None:
            # Nothing ends the last answer: the next turn's first token does.
            firsts = [(one, match) for one in after if (match := self._special.search(one))]
            return list(dict.fromkeys(body + one[: match.end()] for one, match in firsts))
        ends = []
        for one in after:
            shared = _shared(tail, one)
            matches = list(self._special.finditer(shared))
            if matches:
                ends.append(body + tail[: matches[-1].end()])
        if not ends:
            group = self._group.search(tail)
            ends = [body + tail[: group.end()]] if group else []
        return list(dict.fromkeys(ends))

    def _tail_of(self, text: str) -> str:
        """Return the special tokens and white space at the end."""
        end = len(text)
        while True:
            stripped = text[:end].rstrip()
            token = next((one for one in self.special if stripped.endswith(one)), None)
            if token is None:
                return text[len(stripped) :]
            end = len(stripped) - len(token)

    def _gap_behind(self, body: str, text: str, content: str) -> str | None:
        """Return the special tokens and white space behind a body in a text that goes on with a content."""
        stop = text.rfind(content.strip()[:12]) if content.strip() else len(text)
        for length in (40, 24, 12, 6):
            anchor = body[-length:]
            start = text.rfind(anchor, 0, stop if stop >= 0 else len(text))
            if anchor and start >= 0:
                match = self._gap.match(text, start + len(anchor))
                return match.group() if match else None
        return None

    def _expect_moved(
        self,
        answer: Answer,
        prompt: str,
        full: str,
        followed: list[tuple[str, str]],
        history: Sequence[Message],
        message: Message,
    ) -> None:
        """Handle a prompt that is no beginning of the text: a refusal is right, and some texts are."""
        place = self._fork(prompt, full)
        extra, rest = prompt[place:], full[place:]
        answer.reasons.append(
            ("prompt", f"{prompt[max(0, place - 20) :]!r} against {full[max(0, place - 20) :][:80]!r}")
        )
        bare = self._special.sub("", _CLOSED.sub("", extra))
        found = []
        if not bare and not _OPENS.search(_CLOSED.sub("", extra)):
            # The prompt says more than the text, such as an empty block of reasoning; it must not be closed twice.
            closing = _CLOSES.match(rest) if extra.strip() else None
            behind = rest[closing.end() :] if closing else rest
            # Reasoning that follows a closed block of the same kind would be written at a place of its own.
            opening = _OPENS.match(behind.lstrip())
            again = opening is not None and opening.group().lstrip("<[") in extra
            found.append("" if again else behind)
        elif _OPENS.fullmatch(extra.strip()) and _CLOSES.match(rest):
            found.append(rest)
        # The text may differ before, in the history: the last header shows where the answer begins.
        if last := list(self._special.finditer(prompt)):
            header = prompt[last[-1].start() :]
            # Where an answer has several parts with a header each, an earlier one is the first of them.
            places = [match.end() for match in re.finditer(re.escape(header), full)]
            texts = [full[place:] for place in reversed(places)]
            found.append(next((text for text in texts if _tells(text, message)), texts[0] if texts else ""))
        for text in found:
            if _tells(text, message) and not (history and _content(history[-1]) in text):
                answer.targets += [self._target(prompt, end) for end in self._ends(text, followed)]
        answer.targets += self._targets_from_followed(prompt, followed, message)

    def _fork(self, one: str, other: str) -> int:
        """Return where two texts part, at the beginning of a token or a tag."""
        place = len(_shared(one, other))
        for text in (one, other):
            for pattern in (self._special, _TAG):
                around = pattern.finditer(text, max(0, place - 60))
                place = min([place, *(match.start() for match in around if match.start() < place < match.end())])
        return place

    def _targets_from_followed(self, prompt: str, followed: list[tuple[str, str]], message: Message) -> list[Target]:
        """Return what renderings that go on behind the answer say of it, where they start with the prompt."""
        targets = []
        for text, content in followed:
            if not text.startswith(prompt):
                continue
            stop = text.rfind(content.strip()[:12]) if content.strip() else len(text)
            rest = text[len(prompt) : stop]
            if not _tells(rest, message):
                continue
            words = _WORD.findall(" ".join(_said(message)))
            end = max((rest.rfind(word) + len(word) for word in words), default=0)
            match = self._special.search(rest, end)
            if match:
                targets.append(self._target(prompt, rest[: match.end()]))
                group = self._group.match(rest, match.start())
                if group and group.end() != match.end():
                    targets.append(self._target(prompt, rest[: group.end()]))
        return targets

    def _check_history(
        self,
        answers: Sequence[Answer],
        messages: Sequence[Message],
        tools: list[Record] | None,
        prompts: dict[int, str],
    ) -> None:
        """Look whether the prompts hold what was said before, and the tools."""
        for index, message in enumerate(messages):
            later = [answer for answer in answers if answer.index > index and answer.index in prompts]
            said = [_INLINE.sub("", text) for text in _said(message, reasoning=False)]
            missing = [(answer, lost) for answer in later if (lost := _lost(said, prompts[answer.index]))]
            for answer, lost in missing:
                answer.required = False
                answer.reasons.append(("lost", f"{message['role']} {index} before {answer.index}: {' '.join(lost)}"))
                # What no prompt shows is lost. What an answer was trained on, and its template leaves out of the
                # history, is not.
                if len(missing) == len(later) and not is_trained(message):
                    answer.targets.clear()
                    answer.optional = False
        for answer in answers:
            if answer.index not in prompts or answer.optional:
                continue
            lost = _lost([tool["function"]["name"] for tool in tools or []], prompts[answer.index])
            told = _lost([tool["function"]["description"] for tool in tools or []], prompts[answer.index])
            if lost or told:
                answer.required = False
                answer.reasons.append(("lost", f"tools before {answer.index}: {' '.join(lost + told)}"))
                if all(
                    _lost([tool["function"]["description"] for tool in tools or []], one) for one in prompts.values()
                ):
                    answer.targets.clear()


def _said(message: Message, reasoning: bool = True) -> list[str]:
    """Return the texts of a message that must not be lost."""
    texts = [message["content"]] if isinstance(message.get("content"), str) else []
    if isinstance(message.get("content"), list):
        texts += [part.get("text", "") for part in message["content"] if part.get("type") == "text"]
        texts += [part["thinking"] for part in message["content"] if part.get("type") == "thinking" and reasoning]
    if reasoning and message.get("reasoning_content"):
        texts.append(message["reasoning_content"])
    for call in message.get("tool_calls") or ():
        function = call["function"]
        arguments = function["arguments"]
        texts += [function["name"], arguments if isinstance(arguments, str) else json.dumps(arguments)]
    return texts


def _lost(texts: Sequence[str], rendered: str) -> list[str]:
    """Return the words of the texts that a rendering does not hold, in plain or in JSON's spelling."""
    plain = re.sub(r"\\u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), rendered)
    plain = plain.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return [
        word
        for text in texts
        for word in _WORD.findall(text.replace("think>", " ").replace("\\n", " "))
        if word not in rendered and word not in plain
    ]


def _content(message: Message) -> str:
    return str(message.get("content") or "").strip() or "nothing that a text would hold"


def _tells(text: str, message: Message) -> bool:
    """Return whether a text holds all of a message, and little before and behind it."""
    said = _said(message)
    places = [
        (text.find(word), text.rfind(word) + len(word)) for one in said for word in _WORD.findall(one) if len(word) > 3
    ]
    if not places or _lost(said, text):
        return False
    return min(first for first, _ in places) <= 200 and len(text) - max(last for _, last in places) <= 100


def _python_values(text: str, message: Message) -> str:
    """Return a trace of Python's spelling of values in the text, or of JSON within JSON, "" if there is none."""
    if re.search(r"\bNone\b", text) and message.get("tool_calls"):
        return "None"
    for call in message.get("tool_calls") or ():
        arguments = call["function"]["arguments"]
        given = json.loads(arguments) if isinstance(arguments, str) else arguments
        key, value = next(iter(given.items()))
        # Tool definitions hold the same names, but not the value.
        written = json.dumps(value)
        for trace in (f"'{key}': {value!r}", json.dumps(f'"{key}": {written}')[1:-1]):
            if trace in text:
                return trace
    return ""


def _ways(messages: Sequence[Message]) -> Iterator[tuple[str, list[Message]]]:
    """Yield the record's messages in the ways in which a template may want them."""
    if not any(message.get("tool_calls") for message in messages):
        yield "as it is", list(messages)
        return
    for arguments in ("object", "text"):
        for content in ("absent", "empty"):
            yield f"arguments {arguments}, content {content}", [_written(one, arguments, content) for one in messages]


def _written(message: Message, arguments: str, content: str) -> Message:
    if not message.get("tool_calls"):
        return dict(message)
    calls = []
    for call in message["tool_calls"]:
        given = call["function"]["arguments"]
        if arguments == "object" and isinstance(given, str):
            given = json.loads(given)
        elif arguments == "text" and not isinstance(given, str):
            given = json.dumps(given, ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": given}})
    written = {**message, "tool_calls": calls}
    if message.get("content") is None and content == "empty":
        written["content"] = ""
    return written


def _other_ways(messages: Sequence[Message]) -> Iterator[tuple[str, list[Message]]]:
    """Yield ways that say the same in other fields, for templates that do not read the record's own."""
    for way, written in _ways(messages):
        if any(message.get("reasoning_content") for message in messages):
            yield f"{way}, reasoning in parts", [_in_parts(message) for message in written]
            yield f"{way}, reasoning inline", [_inline(message) for message in written]
        if any(_INLINE.match(str(message.get("content") or "")) for message in messages):
            yield f"{way}, inline reasoning apart", [_apart(message) for message in written]


def _in_parts(message: Message) -> Message:
    reasoning = message.get("reasoning_content")
    if not reasoning:
        return message
    parts = [{"type": "thinking", "thinking": reasoning}, {"type": "text", "text": message.get("content") or ""}]
    return {**{key: value for key, value in message.items() if key != "reasoning_content"}, "content": parts}


def _inline(message: Message) -> Message:
    reasoning = message.get("reasoning_content")
    if not reasoning:
        return message
    content = f"<think>\n{reasoning}\n</think>\n\n{message.get('content') or ''}"
    return {**{key: value for key, value in message.items() if key != "reasoning_content"}, "content": content}


def _apart(message: Message) -> Message:
    content = message.get("content")
    match = _INLINE.match(content) if isinstance(content, str) and message["role"] == "assistant" else None
    if match is None or not isinstance(content, str):
        return message
    return {**message, "reasoning_content": match[1].strip(), "content": content[match.end() :].lstrip()}


# The text by which Hermes and Qwen's models are told of their tools.
_TOOLS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{definitions}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def with_settings(oracle: Oracle, record: Record, settings: dict[str, Any]) -> Record:
    """Return the record as a recipe's settings change it before the template sees it.

    Args:
        oracle: of the template, which tells the roles that it cannot write.
        record: the data.
        settings: keys of `chat`; `unsupported_roles: merge_into_user` and `reasoning_format: inline` change records.
    """
    if settings.get("unsupported_roles") == "merge_into_user":
        record = _merged(record, _missing(oracle))
    if settings.get("reasoning_format") == "inline":
        record = {**record, "messages": [_inline(message) for message in record["messages"]]}
    return record


def _missing(oracle: Oracle) -> set[str]:
    """Return the roles whose content is not in a prompt, in whatever way it is given; for results also their calls."""
    question = {"role": "user", "content": "Zebra asks"}
    call = {"role": "assistant", "content": "", "tool_calls": [
        {"id": "abcde1234", "type": "function", "function": {"name": "find", "arguments": {"a": "Quagga"}}}
    ]}  # fmt: skip
    result = {"role": "tool", "tool_call_id": "abcde1234", "name": "find", "content": "Okapi"}
    tool = {"type": "function", "function": {"name": "find", "description": "Finds.", "parameters": {
        "type": "object", "properties": {"a": {"type": "string", "description": "A number."}}
    }}}  # fmt: skip
    tried = {"system": [{"role": "system", "content": "Okapi"}, question], "tool": [question, call, result]}
    return {role for role, messages in tried.items() if not _shows(oracle, messages, tool)}


def _shows(oracle: Oracle, messages: list[Message], tool: Record) -> bool:
    for _, written in _ways(messages):
        for tools in (None, [tool]):
            try:
                text = oracle.render(written, tools, prompt=True)
                if "Okapi" in text and ("Quagga" in text or messages[-1]["role"] != "tool"):
                    return True
            except RenderError:
                continue
    return False


def _merged(record: Record, missing: set[str]) -> Record:
    """Return the record with what the template cannot write as text of the user's next turn."""
    messages = [dict(message) for message in record["messages"]]
    record = dict(record)
    tools = record.pop("tools", None) if "tool" in missing else None
    if tools:
        text = _TOOLS.format(definitions="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
        if messages[0]["role"] == "system":
            messages[0]["content"] += f"\n\n{text}"
        else:
            messages.insert(0, {"role": "system", "content": text})
    done: list[Message] = []
    waiting: list[str] = []
    for message in [*messages, None]:
        if message and message["role"] in missing:
            waiting.append(message["content"])
            continue
        if message and message["role"] == "user":
            done.append({**message, "content": "\n\n".join([*waiting, message["content"]])})
            waiting = []
            continue
        if waiting and done and done[-1]["role"] == "user":
            done[-1]["content"] = "\n\n".join([done[-1]["content"], *waiting])
        elif waiting:
            done.append({"role": "user", "content": "\n\n".join(waiting)})
        waiting = []
        if message:
            done.append(_calls_as_text(message) if "tool" in missing else message)
    return {**record, "messages": done}


def _calls_as_text(message: Message) -> Message:
    calls = message.pop("tool_calls", None)
    if not calls:
        return message
    blocks = []
    for call in calls:
        arguments = call["function"]["arguments"]
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        blocks.append(f'<tool_call>\n{{"name": "{call["function"]["name"]}", "arguments": {written}}}\n</tool_call>')
    content = [message["content"]] if message.get("content") else []
    return {**message, "content": "\n".join([*content, *blocks])}


def saved_fault(expected: Expectation, tokenizer: PreTrainedTokenizerFast, record: Record) -> str:
    """Return the first answer whose prompt a run's saved template writes otherwise; "" if there is none.

    Args:
        expected: what is right.
        tokenizer: with the template that the run saves.
        record: the data, as it came.
    """
    saved = Oracle(tokenizer)
    trained = [index for index, message in enumerate(record["messages"]) if is_trained(message)]
    for index, answer in zip(trained, expected.answers, strict=True):
        found = set()
        for _, messages in _ways(record["messages"]):
            try:
                found.add(saved.render(messages[:index], record.get("tools"), prompt=True))
            except RenderError:
                continue
        if not answer.optional and found.isdisjoint(target.prompt for target in answer.targets):
            return f"the saved template gives answer {index} another prompt"
    return ""


@dataclass
class Example:
    """What a product made: ids, and which of them are trained."""

    ids: list[int]
    trained: list[bool]

    def runs(self) -> list[tuple[int, int]]:
        """Return start and end of each run of trained ids."""
        edges = [index for index in range(len(self.ids) + 1) if self._at(index) != self._at(index - 1)]
        return list(zip(edges[::2], edges[1::2], strict=True))

    def _at(self, index: int) -> bool:
        return 0 <= index < len(self.trained) and self.trained[index]


@dataclass(frozen=True)
class Fault:
    """Why examples are not right: in words, and what is expected and found."""

    words: str
    expected: str = ""
    found: str = ""


def compare(oracle: Oracle, expected: Expectation, examples: Sequence[Example]) -> Fault | None:
    """Return the first fault of the examples of a conversation, None if they are right.

    Args:
        oracle: of the template.
        expected: what is right, in one way of giving the conversation to the template.
        examples: what the product made.
    """
    if not expected.possible:
        return Fault("it must be refused: " + "; ".join(f"{kind} ({text})" for kind, text in expected.reasons[:3]))
    decode = oracle.tokenizer.decode
    runs = [(example, start, end) for example in examples for start, end in example.runs()]
    left = list(runs)
    for answer in expected.answers:
        hits = [run for run in runs if any(_matches(oracle, run, target) for target in answer.targets)]
        if not hits and answer.optional:
            continue
        if len(hits) > 1:
            return Fault(f"answer {answer.index} is trained {len(hits)} times")
        if not hits:
            return _nearest(decode, answer, left)
        left.remove(hits[0])
    if left:
        example, start, end = left[0]
        return Fault("what is no answer is trained", found=_shown(decode, example, start, end))
    return None


def _matches(oracle: Oracle, run: tuple[Example, int, int], target: Target) -> bool:
    example, start, end = run
    before, trained = example.ids[:start], example.ids[start:end]
    if target.specials is None:
        return before == target.prompt_ids and trained == target.answer_ids
    decode = oracle.tokenizer.decode
    specials = oracle.count_special(example.ids[:end])
    return decode(before) == target.prompt and decode(trained) == target.answer and specials in target.specials


def _shown(decode: Any, example: Example, start: int, end: int) -> str:
    return f"{decode(example.ids[:start])}[+{decode(example.ids[start:end])}+]{decode(example.ids[end:])}"


def _nearest(decode: Any, answer: Answer, runs: Sequence[tuple[Example, int, int]]) -> Fault:
    """Say how the run that comes nearest to an answer differs."""
    target = answer.targets[0]
    wanted = f"{target.prompt}[+{target.answer}+]"
    if not runs:
        return Fault(f"answer {answer.index} is not trained", wanted)
    ranked = []
    for example, start, end in runs:
        before, trained = decode(example.ids[:start]), decode(example.ids[start:end])
        for one in answer.targets:
            points = 2 * (before == one.prompt) + 2 * (trained == one.answer)
            shared = len(_shared(before, one.prompt)) / (1 + len(one.prompt))
            ranked.append((points + shared, before == one.prompt, trained == one.answer, example, start, end, one))
    _, same_prompt, same_answer, example, start, end, one = max(ranked, key=lambda item: item[0])
    wanted = f"{one.prompt}[+{one.answer}+]"
    if same_prompt and same_answer:
        words = f"answer {answer.index} has other ids: {example.ids[:end]} for {one.prompt_ids + one.answer_ids}"
    elif same_prompt:
        words = f"answer {answer.index}: other text is trained"
    elif same_answer:
        words = f"answer {answer.index} stands behind another prompt"
    else:
        words = f"answer {answer.index}: prompt and trained text differ"
    return Fault(words, wanted, _shown(decode, example, start, end))
