"""Read data files a second time, without peftchat's readers, and compare every conversation.

    python scripts/check_data_files.py FILE_OR_FOLDER... > table.md

The second reading knows plain layouts: lists of turns, pairs, preferences, `### Human:` text, OpenAssistant trees. It
states for each record which turns and tools it has to become. The script ends with status 1 if one of them differs, is
missing or out of order, or if a record is neither a conversation nor counted with a reason. It prints a Markdown table,
and differences to standard error.
"""

import argparse
import csv
import gzip
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peftchat.conversation import Conversation
from peftchat.conversations import ProblemLog, read_conversations
from peftchat.conversations.dataset_card import SKIPPED
from peftchat.conversations.problems import KINDS
from peftchat.errors import UserError

Turn = tuple[str, str, str, list[Any], bool]
"""Role, text, reasoning, the calls (name and arguments as a value), and whether a flag says that it is not trained."""

ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant", "prompter": "user"}
PAIRS = [
    ("instruction", "output"),
    ("prompt", "completion"),
    ("query", "response"),
    ("input", "output"),
    ("instruction", "response"),
]
ENDINGS = (".json", ".jsonl", ".jsonl.gz", ".csv", ".parquet")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", type=Path, help="files, or folders whose files are read one by one")
    files = sorted(file for path in parser.parse_args().paths for file in ([path] if path.is_file() else walk(path)))
    print("| file | format | records | conversations | left out, and why | fields not used |")
    print("|---|---|---:|---:|---|---|")
    return 1 if sum([check(file) for file in files]) else 0


def walk(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and file.name.endswith(ENDINGS)]


def check(file: Path) -> int:
    """Print the row of one file; return the number of differences."""
    log = ProblemLog()
    records = list(read_again(file))
    try:
        found = list(read_conversations(file, problems=log))
    except UserError as error:
        print(f"| `{file.name}` | none | {len(records):,} | 0 | refused: {error.message.partition(';')[0]} | |")
        return 0
    differences = list(differences_in(records, found, log))
    for difference in differences[:5]:
        print(f"{file}: {difference}", file=sys.stderr)
    print(f"| `{file.name}` | {form_of(log)} | {log.records:,} | {len(found):,} | {left_out(log)} | {unused(log)} |")
    return len(differences)


def read_again(file: Path) -> Iterator[dict[str, Any]]:
    """The records of a file."""
    if file.name.endswith(".parquet"):
        from pyarrow import parquet

        for record in parquet.read_table(file).to_pylist():
            yield {name: opened(value) for name, value in record.items()}
        return
    text = (gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()).decode("utf-8-sig")
    if file.name.endswith(".csv"):
        yield from csv.DictReader(text.splitlines(keepends=True))
    elif ".jsonl" in file.name:
        yield from (json.loads(line) for line in text.split("\n") if line.strip())
    else:
        value = json.loads(text)
        yield from value if isinstance(value, list) else [value]


def opened(value: Any) -> Any:
    """A value of a table; turns that are JSON text, which is how `datasets` stores mixed ones, as objects."""
    if isinstance(value, list):
        return [opened(item) for item in value]
    if isinstance(value, dict):
        return {name: opened(item) for name, item in value.items()}
    return json.loads(value) if isinstance(value, str) and value.startswith("{") else value


def differences_in(records: list[dict[str, Any]], found: list[Conversation], log: ProblemLog) -> Iterator[str]:
    if log.records != len(records):
        yield f"{log.records} records were read, and the file has {len(records)}"
    by_number: dict[int, list[Conversation]] = {}
    for one in found:
        by_number.setdefault(int(one.source.rpartition(":")[2]), []).append(one)
    # In tables of text the place is a line.
    numbers = range(1, len(records) + 1) if set(by_number) <= set(range(1, len(records) + 1)) else sorted(by_number)
    if [one.source for one in found] != [one.source for number in sorted(by_number) for one in by_number[number]]:
        yield "the conversations are not in the order of the file"
    paths = missing = 0
    for number, record in zip(numbers, records, strict=False):
        read = [[turn_of(message) for message in one.messages] for one in by_number.get(number, [])]
        if "message_tree_id" in record:
            expected = list(paths_below(record["prompt"], []))
            paths += len(expected)
            yield from (
                f"record {number}: a conversation that the tree does not have" for one in read if one not in expected
            )
            continue
        missing += not read
        if read and (wanted := turns_of(record)) != read[0]:
            yield f"record {number}: {first_difference(wanted, read[0])}"
        if read and json.loads(by_number[number][0].tools or "[]") != (tools := tools_of(record)):
            yield f"record {number}: tools differ, expected {str(tools)[:200]}"
    lost = log.total + sum(log.skipped.values())
    if paths and paths != len(found) + lost:
        yield f"{paths} paths in the trees, {len(found)} conversations and {lost} left out"
    if missing > lost:
        yield f"{missing} records are no conversations, and {lost} are counted"
    columns = {name for one in found for name in one.columns}
    for name in {name for record in records for name, value in record.items() if value not in (None, "", [], False)}:
        if name not in USED and name not in columns and name not in log.unused and len(found) == len(records):
            yield f"the field {name} is neither read nor named"


USED = {"messages", "conversations", "conversation", "system", "tools", "history", "chosen", "instruction", "input"}
USED |= {"output", "prompt", "completion", "query", "response", "text", "context"}


def turn_of(message: Any) -> Turn:
    calls = [[call.name, call.parsed()] for call in message.tool_calls]
    return (message.role, message.content, message.reasoning or "", calls, message.train is False)


def turns_of(record: dict[str, Any]) -> list[Turn]:
    """The turns that a record has to become, without those behind the last answer."""
    listed = next((record[name] for name in ("messages", "conversations", "conversation") if name in record), None)
    turns: list[Turn] = []
    if listed is not None:
        for turn in [*listed, *([record["chosen"]] if "chosen" in record else [])]:
            for one in turns_in(turn):
                if turns and one[3] and not one[1] and turns[-1][0] == "assistant":
                    turns[-1][3].extend(one[3])
                else:
                    turns.append(one)
    elif "### Human:" in record.get("text", "") or "### Human:" in record.get("input", ""):
        turns = turns_of_text(record)
    elif "chosen" in record:
        for name in ("prompt", "chosen"):
            turns += [one for turn in side(record.get(name), name) for one in turns_in(turn)]
    elif isinstance(record.get("prompt"), list):
        for name in ("prompt", "completion"):
            turns += [one for turn in record[name] for one in turns_in(turn)]
    else:
        asked, answered = next(pair for pair in PAIRS if pair[0] in record and pair[1] in record)
        about = record.get("input") if asked != "input" else None
        for question, answer in record.get("history") or []:
            turns += [("user", question, "", [], False), ("assistant", answer, "", [], False)]
        question = "\n\n".join(text for text in (record[asked], about) if text)
        turns += [("user", question, "", [], False), ("assistant", record[answered], "", [], False)]
    if record.get("system"):
        turns.insert(0, ("system", record["system"], "", [], False))
    while turns and turns[-1][0] != "assistant":
        turns.pop()
    return turns


def side(value: Any, name: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        return [{"role": "user" if name == "prompt" else "assistant", "content": value}]
    return value or []


def turns_in(turn: dict[str, Any]) -> list[Turn]:
    if "human" in turn:
        return [("user", turn["human"], "", [], False), ("assistant", turn["assistant"], "", [], False)]
    name = turn["role"] if "role" in turn else turn["from"]
    content = turn.get("content", turn.get("value")) or ""
    thoughts = turn.get("thinking") or turn.get("reasoning_content") or ""
    given = [call["function"] for call in turn.get("tool_calls") or []]
    role, is_context = ROLES.get(name, name), turn.get("loss_weight") == 0
    if name == "function_call":
        return [(role, "", "", calls_in(json.loads(content)), False)]
    if isinstance(content, str):
        return [(role, content, thoughts, calls_in(given), is_context)]
    kinds: dict[str, list[str]] = {"text": [], "reasoning": [], "tool_call": []}
    for part in content:
        kinds[part["type"]].append(part["value"])
    calls = [call for text in kinds["tool_call"] for call in calls_in(json.loads(text))]
    return [(role, "".join(kinds["text"]), "\n".join(kinds["reasoning"]), calls, is_context)]


def calls_in(value: Any) -> list[Any]:
    return [[call["name"], call["arguments"]] for call in (value if isinstance(value, list) else [value])]


def turns_of_text(record: dict[str, Any]) -> list[Turn]:
    before, *pieces = re.split(r"### (Human|Assistant):", record["text"])
    turns: list[Turn] = [("system", before.strip(), "", [], False)] if before.strip() else []
    for name, text in zip(pieces[::2], pieces[1::2], strict=True):
        turns.append(("user" if name == "Human" else "assistant", text.strip(), "", [], False))
    if turns[-1][1] == "" and record.get("output"):
        turns[-1] = ("assistant", record["output"].strip(), "", [], False)
    return turns


def paths_below(message: dict[str, Any], before: list[Turn]) -> Iterator[list[Turn]]:
    """Every path from a tree's prompt to a message without replies, without a question at its end."""
    path = [*before, (ROLES.get(message["role"], message["role"]), message["text"], "", [], False)]
    if not message.get("replies"):
        yield path if path[-1][0] == "assistant" else path[:-1]
    for reply in message.get("replies") or []:
        yield from paths_below(reply, path)


def tools_of(record: dict[str, Any]) -> Any:
    tools = record.get("tools") or []
    return json.loads(tools) if isinstance(tools, str) else without_nulls(tools)


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def first_difference(wanted: list[Turn], read: list[Turn]) -> str:
    for number, (one, other) in enumerate(zip(wanted, read, strict=False), start=1):
        if one != other:
            return f"turn {number} is {str(other)[:200]}, expected {str(one)[:200]}"
    return f"{len(read)} turns, expected {len(wanted)}"


def form_of(log: ProblemLog) -> str:
    return ", ".join(dict.fromkeys(log.formats.values()))


def left_out(log: ProblemLog) -> str:
    counts: Counter[str] = Counter()
    for kind, count in log.problems.items():
        counts[f"{KINDS[kind]} ({log.examples[kind][0].detail})"] += count
    for rule, count in log.skipped.items():
        counts[SKIPPED[rule]] += count
    return "; ".join(f"{count:,}: {why}" for why, count in counts.items()).replace("|", "\\|")


def unused(log: ProblemLog) -> str:
    return ", ".join(f"{name} ({field.records:,})" for name, field in log.unused.items()).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
