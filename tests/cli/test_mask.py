"""`peftchat mask`: what it shows is what is trained, and it fails where the mask is not what the recipe promises."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from transformers import AutoTokenizer

from peftchat.chat_template.chat_format import make_format
from peftchat.chat_template.examples import EncodedExample
from peftchat.chat_template.loss_mask import IGNORE_INDEX, TurnPart, token_tag
from peftchat.cli.mask import command
from peftchat.errors import UserError, VerificationError
from peftchat.reports.mask_summary import survey_mask
from tests.support.cli import peftchat
from tests.support.data import CONVERSATIONS, write_conversations
from tests.support.recipes import write_recipe
from tests.support.tokenizers import save_tokenizer


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def recipe(tmp_path: Path, tokenizer_folder: Path) -> Path:
    return write_recipe(
        tmp_path / "recipe.yaml", tokenizer_folder, write_conversations(tmp_path / "d.jsonl", CONVERSATIONS)
    )


def mask(recipe: Path, *arguments: object) -> Result:
    return CliRunner().invoke(command, [str(recipe), *map(str, arguments)])


def json_rows(recipe: Path, *arguments: object) -> list[dict[str, Any]]:
    done = mask(recipe, "--json", *arguments)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_json_lines_equal_what_stock_transformers_marks(recipe: Path, tokenizer_folder: Path) -> None:
    plain = [[(role, text.replace("<|", "< |")) for role, text in conversation] for conversation in CONVERSATIONS]
    write_conversations(recipe.parent / "d.jsonl", plain)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    make_format("starchat", None, tokenizer)
    rows = json_rows(recipe)
    assert [row["row"] for row in rows] == [0, 1, 2]
    for number, (row, conversation) in enumerate(zip(rows, plain, strict=True), start=1):
        assert list(row) == ["row", "source", "input_ids", "labels", "tokens", "roles"]
        assert row["source"] == f"{recipe.parent / 'd.jsonl'}:{number}"
        stock = tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in conversation],
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids = list(stock["input_ids"])
        assert row["input_ids"] == ids
        expected = [i if marked else IGNORE_INDEX for i, marked in zip(ids, stock["assistant_masks"], strict=True)]
        assert row["labels"] == expected
        assert row["tokens"] == tokenizer.convert_ids_to_tokens(ids)
        # Each role token opens a turn of its role, and every token up to the next one belongs to it.
        openers = {f"<|{role}|>": role for role in ("system", "user", "assistant")}
        role = None
        for token, told in zip(row["tokens"], row["roles"], strict=True):
            role = openers.get(token, role)
            assert told == role


def test_json_shows_all_examples_unless_told_otherwise(recipe: Path) -> None:
    assert len(json_rows(recipe)) == len(json_rows(recipe, "--rows", "all")) == 3
    assert len(json_rows(recipe, "--rows", 2)) == 2


def test_held_out_examples_are_shown_on_request(recipe: Path, tokenizer_folder: Path) -> None:
    held_out = write_conversations(recipe.parent / "e.jsonl", [[("user", "held"), ("assistant", "out")]])
    entry = f"data.eval=[{{path: {held_out}}}]"
    rows = json_rows(recipe, "--split", "eval", "--set", entry)
    assert [row["source"] for row in rows] == [f"{held_out}:1"]
    refused = mask(recipe, "--split", "eval")
    assert isinstance(refused.exception, UserError)


def test_nothing_is_touched_and_only_the_tokenizer_is_needed(recipe: Path) -> None:
    before = sorted(path.name for path in recipe.parent.iterdir())
    done = peftchat("mask", recipe, "--json")
    assert done.returncode == 0, done.stderr
    assert len([json.loads(line) for line in done.stdout.splitlines()]) == 3
    assert sorted({path.name for path in recipe.parent.iterdir()} - {"cache"}) == before


def test_a_failed_check_is_one_message_and_status_1(recipe: Path) -> None:
    done = peftchat("mask", recipe, "--json", "--set", "chat.special_token_text=error")
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 3
    assert "d.jsonl:2" in done.stderr and "special_token_text" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["chat.loss_on=everything"], "nothing is masked"),
        (["chat.special_token_text=error"], "special token 2 times (first in"),
        (["data.max_length=40", "data.truncation=error"], "longer than data.max_length"),
        (["data.max_length=8"], "everything is masked: no example is left"),
    ],
)
def test_reasons_to_fail(recipe: Path, overrides: list[str], reason: str) -> None:
    done = mask(recipe, *(part for override in overrides for part in ("--set", override)))
    assert isinstance(done.exception, VerificationError)
    assert reason in str(done.exception)


def test_conversations_without_answers_are_all_masked(recipe: Path) -> None:
    write_conversations(recipe.parent / "d.jsonl", [[("user", "Is anybody there?")], [("user", "No?")]])
    done = mask(recipe)
    assert isinstance(done.exception, VerificationError)
    assert "everything is masked" in str(done.exception)
    write_conversations(recipe.parent / "d.jsonl", [[("user", "Is anybody there?")], CONVERSATIONS[0]])
    assert isinstance(mask(recipe).exception, UserError)


@pytest.mark.parametrize("policy", ["answers", "answers_and_headers", "last_answer"])
def test_the_default_policies_pass(recipe: Path, policy: str) -> None:
    done = mask(recipe, "--set", f"chat.loss_on={policy}")
    assert done.exception is None, done.exception
    assert f"chat.loss_on: {policy}" in done.stdout


def test_counts_are_those_of_the_examples(recipe: Path) -> None:
    rows = json_rows(recipe)
    done = mask(recipe)
    pairs = [pair for row in rows for pair in zip(row["roles"], row["labels"], strict=True)]
    for role in ("system", "user", "assistant"):
        tokens = sum(told == role for told, _ in pairs)
        trained = sum(told == role and label != IGNORE_INDEX for told, label in pairs)
        assert re.search(rf"^{role} +{tokens} +{trained} ", done.stdout, re.MULTILINE), done.stdout
    assert re.search(
        rf"^all +{len(pairs)} +{sum(label != IGNORE_INDEX for _, label in pairs)} ", done.stdout, re.MULTILINE
    )


def test_without_colors_brackets_mark_what_is_trained(recipe: Path, tokenizer_folder: Path) -> None:
    shown = mask(recipe, "--rows", "all").stdout.split("[+trained+]")[0]
    marked = re.findall(r"\[\+(.*?)\+\]", shown, re.DOTALL)
    answers = [
        content + "<|end|>" for conversation in CONVERSATIONS for role, content in conversation if role == "assistant"
    ]
    assert marked == answers


def test_what_was_cut_is_struck_through_and_counted(recipe: Path) -> None:
    source = write_conversations(recipe.parent / "d.jsonl", [[("user", "a"), ("assistant", "b")], CONVERSATIONS[2]])
    one_less = f"data.max_length={len(json_rows(recipe)[1]['input_ids']) - 1}"
    done = mask(recipe, "--rows", "1", "--set", one_less)
    assert done.exception is None
    # One example was asked for; the first one that was cut comes with it.
    rows = done.stdout.split("[+trained+]")[0]
    assert f"{source}:1" in rows and f"{source}:2" in rows
    (cut,) = re.findall(r"\[-(.*?)-\]", rows, re.DOTALL)
    assert cut.replace("↵", "") == "<|user|>\nfive six<|end|>\n<|assistant|>\nseven eight nine<|end|>"
    assert "1 example lost 1 round at its end" in done.stdout
    assert mask(recipe, "--rows", "all", "--set", one_less).stdout.split("[+trained+]")[0] == rows
    # Programs get the example as it is trained.
    assert "Ġseven" not in "".join(json_rows(recipe, "--set", one_less)[1]["tokens"])


def test_text_cannot_command_the_terminal(recipe: Path) -> None:
    write_conversations(
        recipe.parent / "d.jsonl", [[("user", "\x1b[2J\x07\u202e"), ("assistant", "\x1b]0;title\x9b31m")]]
    )
    shown = mask(recipe).stdout
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", shown)
    assert "␛" in shown


class _Tokens(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.hints: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name == "data-i":
                self.hints.append(value or "")
            if name in ("src", "href"):
                self.links.append(value or "")


def test_the_page_holds_every_token_and_nothing_from_elsewhere(recipe: Path) -> None:
    page = recipe.parent / "pages" / "mask.html"
    done = mask(recipe, "--html", page)
    assert done.exception is None and done.stdout == ""
    text = page.read_text(encoding="utf-8")
    parser = _Tokens()
    parser.feed(text)
    assert not parser.links and not re.search(r"url\(|@import|https?:", text) and "script" not in parser.tags
    for conversation in CONVERSATIONS:
        assert all(content in parser.text.replace("↵", "") for _, content in conversation)
    rows = json_rows(recipe)
    told = [hint.split(" · ") for hint in parser.hints]
    assert [int(number) for ids, *_ in told for number in ids.split()] == [i for row in rows for i in row["input_ids"]]
    trained = sum(len(ids.split()) for ids, *_, state in told if state == "trained")
    assert trained == sum(label != IGNORE_INDEX for row in rows for label in row["labels"])


def test_bad_flags_are_refused(recipe: Path, tmp_path: Path) -> None:
    assert mask(recipe, "--rows", "many").exit_code == 2
    assert mask(recipe, "--rows", "-1").exit_code == 2
    assert isinstance(mask(tmp_path / "none.yaml").exception, UserError)


def row_of(*codes: int) -> EncodedExample:
    return EncodedExample(np.arange(len(codes), dtype=np.int32), np.array(codes, dtype=np.uint8), "file:1", 0)


def turn(role: str, *, last: bool = False, end: bool = True, marked_end: bool = True) -> list[int]:
    codes = [token_tag(part, role, last_answer=last) for part in (TurnPart.HEADER, TurnPart.CONTENT)]  # type: ignore[arg-type]
    return codes + ([token_tag(TurnPart.END, role, last_answer=last and marked_end)] if end else [])  # type: ignore[arg-type]


def test_an_answer_without_an_end_is_found_wherever_it_stands() -> None:
    rows = [
        row_of(*turn("user"), *turn("assistant", last=True)),
        row_of(*turn("user"), *turn("assistant", end=False), *turn("user"), *turn("assistant", last=True)),
        row_of(*turn("user"), *turn("assistant", end=False), *turn("assistant", last=True, end=False)),
        row_of(*turn("user", end=False), *turn("assistant", last=True)),
    ]
    survey = survey_mask(iter(rows), "answers")
    assert survey.unterminated_answers.count == 3
    assert not survey.untrained_eos.count


def test_a_trained_answer_with_a_silent_end_is_found() -> None:
    good = row_of(*turn("user"), *turn("assistant"), *turn("user"), *turn("assistant", last=True))
    bad = row_of(*turn("user"), *turn("assistant"), *turn("user"), *turn("assistant", last=True, marked_end=False))
    assert survey_mask(iter([good]), "last_answer").untrained_eos.count == 0
    assert survey_mask(iter([bad]), "last_answer").untrained_eos.count == 1
    assert survey_mask(iter([bad]), "answers").untrained_eos.count == 0


def test_what_was_cut_is_shown_where_it_stood(recipe: Path) -> None:
    conversation = [("system", "Be brief."), *CONVERSATIONS[2]]
    write_conversations(recipe.parent / "d.jsonl", [conversation])
    one_less = f"data.max_length={len(json_rows(recipe)[0]['input_ids']) - 1}"
    shown = mask(recipe, "--set", one_less, "--set", "data.truncation=drop_first_turns").stdout.replace("↵", "")
    assert (
        "<|system|>\nBe brief.<|end|>\n"
        "[-<|user|>\none two three<|end|>\n<|assistant|>\nfour<|end|>\n-]"
        "<|user|>\nfive six<|end|>\n<|assistant|>\n[+seven eight nine<|end|>+]"
    ) in shown
    assert "1 example lost 1 round at its beginning" in shown


def test_a_divided_conversation_is_shown_as_its_examples(recipe: Path) -> None:
    source = write_conversations(recipe.parent / "d.jsonl", [CONVERSATIONS[2]])
    one_less = f"data.max_length={len(json_rows(recipe)[0]['input_ids']) - 1}"
    done = mask(recipe, "--set", one_less, "--set", "data.truncation=split")
    assert done.exception is None
    rows = done.stdout.split("[+trained+]")[0]
    assert rows.count(f"{source}:1") == 2 and "[-" not in rows
    assert (
        f"1 conversation became 2 examples ({source}:1)" in done.stdout.replace("\n", "")
        or "became 2 examples" in done.stdout
    )


def test_one_answer_stands_beside_its_prompt(recipe: Path) -> None:
    done = mask(recipe, "--conversation", 1)
    assert done.exception is None, done.exception
    assert "equal those of the prompt at inference" in done.stdout


@pytest.mark.parametrize("arguments", [["--conversation", 9], ["--conversation", 0], ["--turn", 2]])
def test_an_answer_that_is_not_there_is_one_message(recipe: Path, arguments: list[object]) -> None:
    assert isinstance(mask(recipe, *arguments).exception, UserError)
    assert isinstance(mask(recipe, "--conversation", 1, "--turn", 1).exception, UserError)
