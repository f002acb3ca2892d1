"""Chat templates x kinds of conversation: is what `chat.template: model` trains what the model will be asked for?

    python scripts/survey_templates.py FOLDER                       # every .jinja file of the folder
    python scripts/survey_templates.py FOLDER --template Qwen3 --kind tool --show
    python scripts/survey_templates.py FOLDER --json cells.json --markdown table.md

The sdist of llama-cpp-python on PyPI carries 70 published templates (`vendor/llama.cpp/models/templates`). Each gets a
small byte-level tokenizer that has its special tokens. What is right comes from `template_oracle.py`.

Where a refusal names a setting, the conversation is tried again with it, as a user would: such cells are counted apart.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from template_cases import Record, conversations, make_tokenizer, write_record
from template_oracle import Example, Oracle, RenderError, compare, saved_fault, with_settings

RIGHT = "right"
ADVISED = "right with the setting that the refusal names"
REFUSED = "refused rightly"
NEEDLESS = "refused without need"
UNCLEAR = "unclear"
WRONG = "wrong"
CRASH = "crash"
VERDICTS = {RIGHT: "+", ADVISED: "s", REFUSED: "r", NEEDLESS: "n", UNCLEAR: "?", WRONG: "W", CRASH: "!"}

# How Python and Jinja word an accident within a template. Nobody can act on such words alone.
_ACCIDENT = re.compile(
    r"is undefined|object is not|has no (attribute|element)|unsupported operand|can only concatenate|not iterable"
    r"|unexpected keyword|positional argument|must be str|is not JSON serializable|no filter named|is unsafe"
)
_ADVICE = re.compile(
    r"chat\.(?P<key>reasoning_format|unsupported_roles): (?P<value>inline|merge_into_user)\b"
    r"|chat\.template_kwargs: \{(?P<name>\w+): (?P<flag>true|false)\}"
    r"|(?P<end>chat\.end_token)"
)
_MOST_SETTINGS = 4
_EXPLAINED = re.compile(r"wants|needs|without tools|cannot write|fails on|fails for", re.IGNORECASE)


@dataclass
class Cell:
    """One template and one kind of conversation.

    Attributes:
        template: the file's name without its ending.
        kind: of conversation.
        verdict: one of `VERDICTS`.
        words: the product's refusal, or what is wrong.
        expected: the prompt and `[+the answer+]`, where an example is wrong.
        found: the example, likewise.
        reasons: why the oracle holds a refusal for justified.
        examples: how many examples the product made.
        settings: those of `chat` that refusals named, and that were tried.
    """

    template: str
    kind: str
    verdict: str
    words: str = ""
    expected: str = ""
    found: str = ""
    reasons: list[str] = field(default_factory=list)
    examples: int = 0
    settings: dict[str, Any] = field(default_factory=dict)


class Refusal(Exception):
    """The product refused a conversation, with these words.

    Attributes:
        message: the words without place and hint.
    """

    def __init__(self, words: str, message: str) -> None:
        super().__init__(words)
        self.message = message


class Product:
    """peftchat with one tokenizer and settings of `chat`.

    Attributes:
        tokenizer: as a run would save it.
    """

    def __init__(self, tokenizer: Any, settings: dict[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self._settings = settings or {}
        self._encoder: Any = None

    def encode(self, path: Path) -> list[Example]:
        """Return the examples of a file with one record.

        Raises:
            Refusal: the product refuses the template or the record.
        """
        from peftchat.chat_template.chat_format import make_format
        from peftchat.chat_template.loss_mask import loss_mask_table
        from peftchat.chat_template.template_settings import TemplateSettings
        from peftchat.conversations import read_conversations
        from peftchat.conversations.problems import ReadOptions
        from peftchat.errors import UserError

        try:
            # The template has the say in which order roles may follow each other.
            found = list(read_conversations(path, options=ReadOptions(consecutive="keep")))
            if self._encoder is None:
                names = {"template_kwargs": "variables"}
                settings = TemplateSettings(**{names.get(key, key): one for key, one in self._settings.items()})
                self._encoder = make_format("model", None, self.tokenizer, settings=settings).encoder()
            examples = self._encoder.encode(found)
        except UserError as error:
            raise Refusal(str(error), error.message) from error
        table = loss_mask_table("answers")
        return [Example(one.ids.tolist(), table[one.token_tags].tolist()) for one in examples]


def _rendered(oracle: Oracle, records: Sequence[Record]) -> Iterator[str]:
    for record in records:
        for count in (len(record["messages"]), len(record["messages"]) - 1):
            try:
                yield oracle.render(record["messages"][:count], record.get("tools"), prompt=True)
            except RenderError:
                continue


def survey(path: Path, kinds: Sequence[str]) -> list[Cell]:
    """Return the cells of one template."""
    name, source = path.stem, path.read_text(encoding="utf-8")
    plain = make_tokenizer(name, source)
    texts = list(_rendered(Oracle(plain), list(conversations([], plain.eos_token).values())))
    oracle = Oracle(make_tokenizer(name, source, texts))
    products: dict[str, tuple[Oracle, Product]] = {}

    def given(settings: dict[str, Any]) -> tuple[Oracle, Product]:
        """Return oracle and product with settings."""
        key = json.dumps(settings)
        if key not in products:
            own = Oracle(make_tokenizer(name, source, texts), settings.get("template_kwargs"))
            products[key] = own, Product(make_tokenizer(name, source, texts), settings)
        return products[key]

    own = [token for token in oracle.special if token in "".join(texts)]
    cells = []
    with tempfile.TemporaryDirectory(prefix="survey-") as folder:
        for kind, record in conversations(own, oracle.tokenizer.eos_token).items():
            if not kinds or kind in kinds:
                file = write_record(record, Path(folder, f"{kind}.jsonl"))
                cell = judge(Cell(name, kind, CRASH), *given({}), record, file)
                cells.append(with_advice(cell, given, record, file) if cell.verdict == REFUSED else cell)
    return cells


def with_advice(
    refused: Cell, given: Callable[[dict[str, Any]], tuple[Oracle, Product]], record: Record, file: Path
) -> Cell:
    """Return a refused cell as it is with the settings that its words name, one after the other."""
    cell, settings = refused, dict[str, Any]()
    for _ in range(_MOST_SETTINGS):
        found = next((one for one in advised(cell.words, given({})[0]) if one[0] not in settings), None)
        if found is None:
            break
        settings = {**settings, found[0]: found[1]}
        oracle, product = given(settings)
        cell = judge(Cell(refused.template, refused.kind, CRASH), oracle, product, record, file, settings)
        cell.settings = settings
        if cell.verdict == RIGHT:
            cell.verdict = ADVISED
            return cell
        if cell.verdict != REFUSED:
            return cell  # whatever is wrong with a setting is wrong
    refused.settings = settings
    return refused


def advised(words: str, oracle: Oracle) -> Iterator[tuple[str, Any]]:
    """Yield the settings that a refusal names, with their values."""
    for match in _ADVICE.finditer(words):
        if match["key"]:
            yield match["key"], match["value"]
        elif match["name"]:
            yield "template_kwargs", {match["name"]: match["flag"] == "true"}
        else:
            yield "end_token", oracle.tokenizer.eos_token


def judge(
    cell: Cell,
    oracle: Oracle,
    product: Product,
    record: Record,
    file: Path,
    settings: dict[str, Any] | None = None,
) -> Cell:
    """Fill in a cell's verdict."""
    expected = oracle.expectations(with_settings(oracle, record, settings or {}))
    cell.reasons = list(dict.fromkeys(f"{kind}: {text}" for one in expected for kind, text in one.reasons))
    try:
        examples = product.encode(file)
    except Refusal as refusal:
        cell.words = str(refusal).replace(f"{file}", "FILE")
        needed = not any(one.required for one in expected)
        true = is_true(refusal.message, cell.reasons)
        cell.verdict = (REFUSED if needed else NEEDLESS) if true else UNCLEAR
        return cell
    except Exception as error:  # whatever it is, it is told per cell
        cell.words = f"{type(error).__name__}: {error}"
        return cell
    cell.examples = len(examples)
    faults = [(one, compare(oracle, one, examples)) for one in expected]
    right = [one for one, fault in faults if fault is None]
    if right and settings:
        # At inference the template that the run saves must give the same prompts, without any argument.
        saved = [saved_fault(one, product.tokenizer, record) for one in right]
        cell.words = "" if "" in saved else saved[0]
    if right:
        cell.verdict = WRONG if cell.words else RIGHT
        return cell
    _, fault = next(((one, fault) for one, fault in faults if one.possible), faults[0])
    cell.verdict, cell.words, cell.expected, cell.found = WRONG, fault.words, fault.expected, fault.found
    if not cell.found and examples:
        cell.found = "\n".join(_shown(oracle, one) for one in examples)
    return cell


def _shown(oracle: Oracle, example: Example) -> str:
    text, place = "", 0
    for start, end in example.runs():
        text += oracle.tokenizer.decode(example.ids[place:start])
        text += f"[+{oracle.tokenizer.decode(example.ids[start:end])}+]"
        place = end
    return text + oracle.tokenizer.decode(example.ids[place:])


def is_true(words: str, reasons: Sequence[str]) -> bool:
    """Return whether a refusal's words are true, and more than an accident's."""
    if _ACCIDENT.search(words) and not _EXPLAINED.search(words):
        return False
    quoted = re.search(r"(?:refuses|cannot write|fails on) the conversation: (.*)", words)
    if quoted:
        # What the template is said to say must be what it says to stock transformers too.
        raised = [reason for reason in reasons if reason.startswith("raises")]
        return any(quoted[1].strip() in reason for reason in raised)
    return True


def table(cells: Sequence[Cell]) -> str:
    """Return the table template x kind in Markdown."""
    kinds = list(dict.fromkeys(cell.kind for cell in cells))
    marks = {(cell.template, cell.kind): VERDICTS[cell.verdict] for cell in cells}
    lines = ["| template | " + " | ".join(kinds) + " |", "| --- |" + " :-: |" * len(kinds)]
    for template in dict.fromkeys(cell.template for cell in cells):
        row = [marks.get((template, kind), "") for kind in kinds]
        lines.append(f"| {template} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def terminal_table(cells: Sequence[Cell]) -> str:
    kinds = list(dict.fromkeys(cell.kind for cell in cells))
    marks = {(cell.template, cell.kind): VERDICTS[cell.verdict] for cell in cells}
    lines = [f"{'':46} " + " ".join(kind[:6].ljust(6) for kind in kinds)]
    for template in dict.fromkeys(cell.template for cell in cells):
        lines.append(f"{template[:46]:46} " + " ".join(marks.get((template, kind), "").ljust(6) for kind in kinds))
    return "\n".join(lines)


def summary(cells: Sequence[Cell]) -> str:
    counts = Counter(cell.verdict for cell in cells)
    templates = len({cell.template for cell in cells})
    head = f"{templates} templates, {len(cells)} cells: "
    return head + ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)


def legend() -> str:
    return ", ".join(f"`{mark}` {verdict}" for verdict, mark in VERDICTS.items())


def refusals(cells: Sequence[Cell]) -> str:
    """Return each refusal's words with its count."""
    counts: Counter[tuple[str, str]] = Counter()
    for cell in cells:
        if cell.verdict in (REFUSED, NEEDLESS, UNCLEAR, CRASH):
            counts[cell.verdict, re.sub(r"FILE(:\d+)?: ", "", cell.words)[:150]] += 1
    return "\n".join(f"{count:5}  {verdict}: {words}" for (verdict, words), count in counts.most_common())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with .jinja files")
    parser.add_argument("--template", action="append", default=[], help="only files whose name contains this")
    parser.add_argument("--kind", action="append", default=[], help="only this kind of conversation")
    parser.add_argument("--show", action="store_true", help="print what is found and expected for each cell not right")
    parser.add_argument("--json", type=Path, help="write all cells to this file")
    parser.add_argument("--markdown", type=Path, help="write summary and table to this file")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    files = [file for file in sorted(options.folder.glob("*.jinja")) if _chosen(file.stem, options.template)]
    if not files:
        sys.exit(f"no .jinja file in {options.folder}")
    start = time.perf_counter()
    with ProcessPoolExecutor(min(options.processes, len(files))) as pool:
        found = list(pool.map(survey, files, [options.kind] * len(files)))
    cells = [cell for part in found for cell in part]
    if options.show:
        show(cells)
    else:
        print(terminal_table(cells))
        print(f"\n{refusals(cells)}")
    print(f"\n{summary(cells)} ({time.perf_counter() - start:.0f} s)")
    if options.json:
        options.json.write_text(json.dumps([asdict(cell) for cell in cells], ensure_ascii=False, indent=1))
    if options.markdown:
        options.markdown.write_text(f"{summary(cells)}.\n\n{legend()}.\n\n{table(cells)}\n", encoding="utf-8")


def _chosen(name: str, parts: Sequence[str]) -> bool:
    return not parts or any(part.lower() in name.lower() for part in parts)


def show(cells: Sequence[Cell]) -> None:
    for cell in cells:
        print(f"== {cell.template} x {cell.kind}: {cell.verdict} ({cell.examples} examples)")
        for title in ("words", "expected", "found"):
            if text := getattr(cell, title):
                print(f"-- {title}\n{text}")
        for reason in cell.reasons:
            print(f"-- {reason}")


if __name__ == "__main__":
    main()
