"""Chat templates x kinds of conversation: is what `chat.template: model` trains what the model will be asked for?

    python scripts/survey_templates.py FOLDER                       # every .jinja file of the folder
    python scripts/survey_templates.py FOLDER --template Qwen3 --kind tool --show
    python scripts/survey_templates.py FOLDER --json cells.json --markdown table.md

The sdist of llama-cpp-python on PyPI carries 70 published templates (`vendor/llama.cpp/models/templates`). Each gets a
small byte-level tokenizer that has its special tokens. What is right comes from `template_oracle.py`.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from template_cases import Record, conversations, make_tokenizer, write_record
from template_oracle import Example, Oracle, RenderError, compare

RIGHT = "right"
REFUSED = "refused rightly"
NEEDLESS = "refused without need"
UNCLEAR = "unclear"
WRONG = "wrong"
CRASH = "crash"
VERDICTS = {RIGHT: "+", REFUSED: "r", NEEDLESS: "n", UNCLEAR: "?", WRONG: "W", CRASH: "!"}

# How Python and Jinja word an accident within a template. Nobody can act on such words alone.
_ACCIDENT = re.compile(
    r"is undefined|object is not|has no (attribute|element)|unsupported operand|can only concatenate|not iterable"
    r"|unexpected keyword|positional argument|must be str|is not JSON serializable|no filter named|is unsafe"
)
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
    """

    template: str
    kind: str
    verdict: str
    words: str = ""
    expected: str = ""
    found: str = ""
    reasons: list[str] = field(default_factory=list)
    examples: int = 0


class Refusal(Exception):
    """The product refused a conversation, with these words.

    Attributes:
        message: the words without place and hint.
    """

    def __init__(self, words: str, message: str) -> None:
        super().__init__(words)
        self.message = message


class Product:
    """peftchat with one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._encoder: Any = None

    def encode(self, path: Path) -> list[Example]:
        """Return the examples of a file with one record.

        Raises:
            Refusal: the product refuses the template or the record.
        """
        from peftchat.chat_template.chat_format import make_format
        from peftchat.chat_template.loss_mask import loss_mask_table
        from peftchat.conversations import read_conversations
        from peftchat.conversations.problems import ReadOptions
        from peftchat.errors import UserError

        try:
            # The template has the say in which order roles may follow each other.
            found = list(read_conversations(path, options=ReadOptions(consecutive="keep")))
            if self._encoder is None:
                self._encoder = make_format("model", None, self._tokenizer).encoder()
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
    product = Product(make_tokenizer(name, source, texts))
    own = [token for token in oracle.special if token in "".join(texts)]
    cells = []
    with tempfile.TemporaryDirectory(prefix="survey-") as folder:
        for kind, record in conversations(own, oracle.tokenizer.eos_token).items():
            if not kinds or kind in kinds:
                file = write_record(record, Path(folder, f"{kind}.jsonl"))
                cells.append(judge(Cell(name, kind, CRASH), oracle, product, record, file))
    return cells


def judge(cell: Cell, oracle: Oracle, product: Product, record: Record, file: Path) -> Cell:
    """Fill in a cell's verdict."""
    expected = oracle.expectations(record)
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
    if any(fault is None for _, fault in faults):
        cell.verdict = RIGHT
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
