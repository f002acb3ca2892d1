"""Puts questions and answers about one object together into dialogues."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from peftchat.conversation import Conversation, Message
from peftchat.sources.from_code import phrases
from peftchat.sources.from_code.answers import Answers
from peftchat.sources.from_code.english import article
from peftchat.sources.from_code.inventory import CodeObject
from peftchat.sources.from_code.survey import Survey, survey

Turn = tuple[str, str | None]
"""A question and its answer, None where there is no honest one."""


@dataclass(frozen=True, slots=True)
class CodeDialogue:
    """A dialogue, the object it asks about, and the outermost object that one belongs to."""

    conversation: Conversation
    object: str
    group: str
    kind: str


def dialogues_from_code(roots: Sequence[str], *, seed: int = 0, private: bool = False) -> Iterator[Conversation]:
    """Dialogues about the Python code of some packages or folders, the same for the same seed.

    Args:
        roots: package names, folders or files; they are read, never imported.
        seed: chooses the phrasings.
        private: ask also about names that start with an underscore.

    Raises:
        InputError: a root does not exist or has no Python source.
    """
    for dialogue in dialogues_about(survey(roots, private=private), seed=seed):
        yield dialogue.conversation


def dialogues_about(found: Survey, *, seed: int) -> Iterator[CodeDialogue]:
    """Every dialogue about the objects of a survey, in its order."""
    for item in found.objects:
        answers = Answers(item, found.siblings.get(item.module, frozenset()))
        # Seeded by the object's name, so that adding one function to a package leaves the others' dialogues alone.
        choose = _Chooser(item, random.Random(f"{seed}:{item.full_name}"))
        for kind, turns in _plans(item, answers, choose):
            messages = _messages(turns)
            if messages:
                conversation = Conversation(messages, found.places[item.full_name])
                yield CodeDialogue(conversation, item.full_name, item.top, kind)


class _Chooser:
    """Picks phrasings for one object."""

    def __init__(self, item: CodeObject, rng: random.Random) -> None:
        owner, _, short = item.full_name.rpartition(".")
        self.rng = rng
        self.fields = {
            "name": item.full_name,
            "short": short,
            "owner": owner,
            "module": item.module,
            "a_owner": f"{article(owner or short)} `{owner}`",
            "a_name": f"{article(item.full_name)} `{item.full_name}`",
        }

    def __call__(self, options: Sequence[str], **fields: str) -> str:
        return self.rng.choice(options).format(**self.fields, **fields)

    def coin(self, chance: float = 0.5) -> bool:
        """True with this probability."""
        return self.rng.random() < chance


def _messages(turns: Sequence[Turn]) -> tuple[Message, ...]:
    """The leading turns that have an answer; later ones would refer to what was not said."""
    messages: list[Message] = []
    for question, answer in turns:
        if answer is None:
            break
        messages += [Message("user", question), Message("assistant", answer)]
    return tuple(messages)


def _plans(item: CodeObject, answers: Answers, choose: _Chooser) -> Iterator[tuple[str, list[Turn]]]:
    """The dialogues worth having about one object, as (kind, turns)."""
    if item.kind == "module":
        yield "module", _module_turns(answers, choose)
        return
    if answers.doc.prose:
        yield "what", _what_turns(item, answers, choose)
    if item.kind in phrases.CALL:
        call = answers.call(from_import=choose.coin())
        if not answers.doc.prose or (item.kind != "property" and choose.coin(0.35)):
            yield "call", [(choose(phrases.CALL[item.kind]), call)]
    if item.kind in {"function", "method"}:
        yield from _function_plans(item, answers, choose)
    if item.kind == "class" and choose.coin():
        yield "members", [(choose(phrases.MEMBERS["class"]), answers.members())]
    for parameter in item.parameters or ():
        if (meaning := answers.parameter(parameter)) is not None and choose.coin():
            yield "parameter", [(choose(phrases.PARAMETER, parameter=parameter.name), meaning)]


def _module_turns(answers: Answers, choose: _Chooser) -> list[Turn]:
    what, members = answers.what(), answers.members()
    if what is None:
        return [(choose(phrases.MEMBERS["module"]), members)]
    return [(choose(phrases.WHAT["module"]), what), (choose(phrases.MEMBERS_NEXT["module"]), members)]


def _what_turns(item: CodeObject, answers: Answers, choose: _Chooser) -> list[Turn]:
    """What it is, then how to use it, then one more detail."""
    turns: list[Turn] = [(choose(phrases.WHAT[item.kind]), answers.what())]
    following = {"class": phrases.CREATE_NEXT, "property": phrases.READ_NEXT}.get(item.kind, phrases.CALL_NEXT)
    if choose.coin(0.7):
        turns.append((choose(following), answers.call(from_import=choose.coin())))
    elif item.kind == "class":
        turns.append((choose(phrases.MEMBERS_NEXT["class"]), answers.members()))
    if item.kind in {"function", "method"} and choose.coin(0.4):
        if (errors := answers.raises()) is not None and choose.coin():
            turns.append((choose(phrases.RAISES_NEXT), errors))
        elif item.options:
            parameter = choose.rng.choice(item.options)
            answer = answers.default(parameter)
            if not any(answer in (said or "") for _, said in turns):
                turns.append((choose(phrases.DEFAULT_NEXT, parameter=parameter.name), answer))
    return turns


def _function_plans(item: CodeObject, answers: Answers, choose: _Chooser) -> Iterator[tuple[str, list[Turn]]]:
    if answers.task and item.kind == "function" and not answers.task.startswith("get "):
        call = answers.call(from_import=True)
        found = f"Use `{item.full_name}`. {call}" if call else None
        yield "find", [(choose(phrases.FIND, task=answers.task, kind=item.kind), found)]
    source = answers.source()
    if source is not None:
        if (question := _write_question(item, answers, choose)) is not None:
            written = f"{choose(phrases.WROTE)}\n\n```python\n{source}\n```"
            follow_up: list[Turn] = [(choose(phrases.EXPLAIN_NEXT), answers.how())] if choose.coin(0.4) else []
            yield "write", [(question, written), *follow_up]
        if choose.coin(0.6):
            yield "explain", [(f"{choose(phrases.EXPLAIN)}\n\n```python\n{source}\n```", answers.explanation())]
    if choose.coin(0.3):
        yield "parameters", [(choose(phrases.PARAMETERS), answers.parameters())]
    if choose.coin(0.3):
        yield "raises", [(choose(phrases.RAISES), answers.raises())]


def _write_question(item: CodeObject, answers: Answers, choose: _Chooser) -> str | None:
    if answers.task is not None:
        task = f"return {answers.task[4:]}" if answers.task.startswith("get ") else answers.task
        if item.kind == "method":
            return choose(phrases.WRITE["method"], signature=answers.signature(), task=task)
        return choose(phrases.WRITE["plain"], signature=answers.signature(), task=task)
    if answers.doc.prose and item.kind == "function":
        return choose(phrases.WRITE["described"], signature=answers.signature(), description=answers.doc.prose[0])
    return None
