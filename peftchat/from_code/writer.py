"""Writer of conversations about code: choose questions, add answers, split."""

import json
import os
import random
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import Any

from peftchat.conversation import Conversation, Message
from peftchat.errors import UserError
from peftchat.files import write_text
from peftchat.from_code import phrases
from peftchat.from_code.answers import Answers
from peftchat.from_code.english import article
from peftchat.from_code.inventory import CodeObject
from peftchat.from_code.survey import Survey, survey
from peftchat.output_paths import InputPath, check_output

Turn = tuple[str, str | None]
"""A question and its answer; None if the source does not contain the answer."""

_NO_TEXT = re.compile("[\x00\ud800-\udfff]")
_TRAIN, _EVAL, _CARD = "train.jsonl", "eval.jsonl", "card.json"


@dataclass(frozen=True, slots=True)
class CodeConversation:
    """A conversation about one object.

    Attributes:
        conversation: the messages.
        object: full name of the object.
        group: full name of the outermost object that contains it.
        kind: the kind of question.
    """

    conversation: Conversation
    object: str
    group: str
    kind: str


def conversations_from_code(roots: Sequence[str], *, seed: int = 0, private: bool = False) -> Iterator[Conversation]:
    """Yield conversations about the Python code of packages or folders.

    The same seed gives the same conversations.

    Args:
        roots: package names, folders or files; they are read, never imported.
        seed: seed of the phrasings.
        private: whether to include names that start with an underscore.

    Raises:
        UserError: a root does not exist or has no Python source.
    """
    for conversation in conversations_about(survey(roots, private=private), seed=seed):
        yield conversation.conversation


def conversations_about(found: Survey, *, seed: int) -> Iterator[CodeConversation]:
    """Yield every conversation about the objects of a survey, in its order."""
    for item in found.objects:
        answers = Answers(item, found.siblings.get(item.module, frozenset()))
        # The seed includes the name, so that a function added to a package does not change other conversations.
        choose = _Chooser(item, random.Random(f"{seed}:{item.full_name}"))
        for kind, turns in _drafts(item, answers, choose):
            messages = _messages(turns)
            if messages and all(_is_text(message.content) for message in messages):
                conversation = Conversation(messages, found.locations[item.full_name])
                yield CodeConversation(conversation, item.full_name, item.outermost_name, kind)


class _Chooser:
    """Chooses phrasings for one object."""

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
        """Return True with this probability."""
        return self.rng.random() < chance


def _is_text(content: str) -> bool:
    """Whether a content is one that data files hold: escapes in a docstring can be half a character, or a NUL."""
    return _NO_TEXT.search(content) is None


def _messages(turns: Sequence[Turn]) -> tuple[Message, ...]:
    """Return the messages of the leading turns that have an answer.

    Later turns may refer to the answer that is missing.
    """
    messages: list[Message] = []
    for question, answer in turns:
        if answer is None:
            break
        messages += [Message("user", question), Message("assistant", answer)]
    return tuple(messages)


def _drafts(item: CodeObject, answers: Answers, choose: _Chooser) -> Iterator[tuple[str, list[Turn]]]:
    """Yield the kind and the turns of each conversation about one object."""
    if item.kind == "module":
        yield "module", _module_turns(answers, choose)
        return
    if answers.doc.prose:
        yield "what", _what_turns(item, answers, choose)
    if item.kind in phrases.CALL:
        call = answers.usage(from_import=choose.coin())
        if not answers.doc.prose or (item.kind != "property" and choose.coin(0.35)):
            yield "call", [(choose(phrases.CALL[item.kind]), call)]
    if item.kind in {"function", "method"}:
        yield from _function_drafts(item, answers, choose)
    if item.kind == "class" and choose.coin():
        yield "members", [(choose(phrases.MEMBERS["class"]), answers.members())]
    for parameter in item.parameters or ():
        if (meaning := answers.parameter(parameter)) is not None and choose.coin():
            yield "parameter", [(choose(phrases.PARAMETER, parameter=parameter.name), meaning)]


def _module_turns(answers: Answers, choose: _Chooser) -> list[Turn]:
    what, members = answers.description(), answers.members()
    if what is None:
        return [(choose(phrases.MEMBERS["module"]), members)]
    return [(choose(phrases.WHAT["module"]), what), (choose(phrases.MEMBERS_NEXT["module"]), members)]


def _what_turns(item: CodeObject, answers: Answers, choose: _Chooser) -> list[Turn]:
    """Return turns about the description, then the usage, then one detail."""
    turns: list[Turn] = [(choose(phrases.WHAT[item.kind]), answers.description())]
    following = {"class": phrases.CREATE_NEXT, "property": phrases.READ_NEXT}.get(item.kind, phrases.CALL_NEXT)
    if choose.coin(0.7):
        turns.append((choose(following), answers.usage(from_import=choose.coin())))
    elif item.kind == "class":
        turns.append((choose(phrases.MEMBERS_NEXT["class"]), answers.members()))
    if item.kind in {"function", "method"} and choose.coin(0.4):
        if (errors := answers.raises()) is not None and choose.coin():
            turns.append((choose(phrases.RAISES_NEXT), errors))
        elif item.optional_parameters:
            parameter = choose.rng.choice(item.optional_parameters)
            answer = answers.default(parameter)
            if not any(answer in (earlier or "") for _, earlier in turns):
                turns.append((choose(phrases.DEFAULT_NEXT, parameter=parameter.name), answer))
    return turns


def _function_drafts(item: CodeObject, answers: Answers, choose: _Chooser) -> Iterator[tuple[str, list[Turn]]]:
    if answers.task and item.kind == "function" and not answers.task.startswith("get "):
        call = answers.usage(from_import=True)
        found = f"Use `{item.full_name}`. {call}" if call else None
        yield "find", [(choose(phrases.FIND, task=answers.task, kind=item.kind), found)]
    source = answers.source()
    if source is not None:
        if (question := _write_question(item, answers, choose)) is not None:
            written = f"{choose(phrases.WROTE)}\n\n```python\n{source}\n```"
            follow_up: list[Turn] = [(choose(phrases.EXPLAIN_NEXT), answers.statements())] if choose.coin(0.4) else []
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


@dataclass(frozen=True, slots=True)
class WrittenConversations:
    """The written files.

    Attributes:
        folder: the folder with `train.jsonl`, `eval.jsonl` and `card.json`.
        card: the content of `card.json`.
    """

    folder: Path
    card: dict[str, Any]


def write_conversations(
    roots: Sequence[str],
    folder: Path,
    *,
    seed: int = 0,
    max_samples: int | None = None,
    eval_fraction: float = 0.1,
    private: bool = False,
) -> WrittenConversations:
    """Write conversations about code as `train.jsonl` and `eval.jsonl`.

    Their statistics go to `card.json` in the same folder.

    Args:
        roots: package names, folders or files.
        folder: the output folder; existing files of an earlier call are replaced.
        seed: seed of phrasings, split and, with `max_samples`, the selection.
        max_samples: most records in both files together, drawn evenly over the objects.
        eval_fraction: fraction of the records held out, from 0 (none) to below 1.
        private: whether to include names that start with an underscore.

    Raises:
        UserError: a root cannot be read, nothing is documented, or `folder` cannot be written.
    """
    _check_folder(folder, roots)
    found = survey(roots, private=private)
    conversations = list(conversations_about(found, seed=seed))
    if not conversations:
        raise UserError(
            f"no documented function, class or module in the {found.files} files read{_invalid(found)}",
            where=", ".join(roots),
            hint="Conversations are made from docstrings and signatures: add docstrings, or name another package.",
        )
    kept = _sample_evenly(conversations, max_samples, seed)
    train, held_out = split(kept, eval_fraction, seed)
    card = {
        "made_by": f"peftchat {version('peftchat')} data from-code",
        "roots": list(roots),
        "seed": seed,
        "max_samples": max_samples,
        "eval_fraction": eval_fraction,
        "split_by": "object",
        "files_read": found.files,
        "objects": len(found.objects),
        "conversations_made": len(conversations),
        "left_out_by_max_samples": len(conversations) - len(kept),
        "skipped": dict(sorted(found.skipped.items())),
        "unreadable": list(found.unreadable),
        "train": _statistics(train),
        "eval": _statistics(held_out),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / _TRAIN, _as_jsonl(train))
        write_text(folder / _EVAL, _as_jsonl(held_out))
        write_text(folder / _CARD, json.dumps(card, ensure_ascii=False, indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"cannot be written ({error.strerror})", where=str(folder), hint="Name another folder."
        ) from error
    return WrittenConversations(folder, card)


def _invalid(found: Survey) -> str:
    """How many files could not be read, with the first of them; "" for none."""
    more = f"; {len(found.unreadable)} not valid Python" if found.unreadable else ""
    return f"{more} ({found.unreadable[0]})" if more else ""


def _check_folder(folder: Path, roots: Sequence[str]) -> None:
    """Check that the files may be written: those of an earlier call are replaced, others never."""
    check_output(folder, [InputPath(Path(root), "the code") for root in roots if _is_path(root)], str(folder))
    if folder.exists() and not folder.is_dir():
        raise UserError("is a file, not a folder", where=str(folder), hint="Name a folder with -o.")
    there = [name for name in (_TRAIN, _EVAL, _CARD) if os.path.lexists(folder / name)]
    if there and not _is_own_card(folder / _CARD):
        what = f"the folder holds a {there[0]} that `data from-code` did not write"
        raise UserError(what, where=str(folder), hint="Name another folder with -o.")
    linked = next((name for name in there if (folder / name).is_symlink() or not (folder / name).is_file()), None)
    if linked is not None:
        raise UserError(f"{linked} there is not a file", where=str(folder), hint="Name another folder with -o.")


def _is_path(root: str) -> bool:
    return os.sep in root or not root.replace(".", "").isidentifier()


def _is_own_card(card: Path) -> bool:
    try:
        made_by = json.loads(card.read_text(encoding="utf-8"))["made_by"]
    except (OSError, ValueError, LookupError, TypeError):
        return False
    return str(made_by).startswith("peftchat ") and str(made_by).endswith("data from-code")


def split(
    conversations: Sequence[CodeConversation], eval_fraction: float, seed: int
) -> tuple[list[CodeConversation], list[CodeConversation]]:
    """Split conversations into shuffled training and evaluation sets.

    A class, its methods and its properties are in the same set.
    """
    rng = random.Random(f"{seed}:split")
    groups = sorted({conversation.group for conversation in conversations})
    rng.shuffle(groups)
    sizes = Counter(conversation.group for conversation in conversations)
    wanted = round(len(conversations) * eval_fraction)
    held_out_groups: set[str] = set()
    count = 0
    for group in groups:
        # One large class must not fill the evaluation set, so a group far beyond the wanted size is skipped.
        if count < wanted and (count + sizes[group] <= 1.5 * wanted or sizes[group] == 1):
            held_out_groups.add(group)
            count += sizes[group]
    train = [conversation for conversation in conversations if conversation.group not in held_out_groups]
    held_out = [conversation for conversation in conversations if conversation.group in held_out_groups]
    rng.shuffle(train)
    rng.shuffle(held_out)
    return train, held_out


def _sample_evenly(conversations: Sequence[CodeConversation], limit: int | None, seed: int) -> list[CodeConversation]:
    """Draw at most `limit` conversations, evenly over the objects."""
    if limit is None or len(conversations) <= limit:
        return list(conversations)
    rng = random.Random(f"{seed}:draw")
    shuffled = rng.sample(range(len(conversations)), len(conversations))
    seen: Counter[str] = Counter()
    rounds = []
    for index in shuffled:
        rounds.append((seen[conversations[index].object], index))
        seen[conversations[index].object] += 1
    rounds.sort(key=itemgetter(0))  # stable: the shuffled order stays within a round
    return [conversations[index] for index in sorted(index for _, index in rounds[:limit])]


def _statistics(conversations: Sequence[CodeConversation]) -> dict[str, Any]:
    answers = [
        len(message.content)
        for conversation in conversations
        for message in conversation.conversation.messages
        if message.role == "assistant"
    ]
    return {
        "conversations": len(conversations),
        "objects": len({conversation.object for conversation in conversations}),
        "turns": sum(len(conversation.conversation.messages) for conversation in conversations),
        "kinds": dict(sorted(Counter(conversation.kind for conversation in conversations).items())),
        "mean_answer_characters": round(statistics.fmean(answers), 1) if answers else 0,
    }


def _as_jsonl(conversations: Sequence[CodeConversation]) -> str:
    records = ({"messages": item.conversation.as_dicts(), "object": item.object} for item in conversations)
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
