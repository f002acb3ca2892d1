"""Answering a file: what is kept, what is continued, and what is refused before anything is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest

from peftchat.answering import answer_run
from peftchat.answering.answer_run import AnswerOptions, answer_questions, file_names
from peftchat.answering.questions import Question, read_questions
from peftchat.conversation import Message
from peftchat.errors import UserError
from peftchat.serving.chat_model import load_for_chat
from peftchat.serving.generate import generate_answer
from peftchat.serving.sampling import Sampling, apply_sampling
from tests.support.chat_models import save_model, save_scripted
from tests.support.in_process import peftchat_in_process

SAMPLED = AnswerOptions(Sampling(temperature=1.2, max_new_tokens=8, seed=3), batch_size=3)
ASKED = [
    *(Question(number, (f"question {number} " * (1 + number % 3),)) for number in range(5)),
    Question("two", ("first", "and then?"), (Message("system", "Be brief."),), "writing", ("a", "b")),
    Question("long", ("one", "two", "three")),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("model") / "small"))


def answer(model: str, output: Path, asked: list[Question] = ASKED, options: AnswerOptions = SAMPLED) -> list[Any]:
    answer_questions(asked, [(model, "template")], output, options)
    lines = (output / "small.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def whole(model: str, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return answer(model, tmp_path_factory.mktemp("whole"))


def test_turns_are_answered_one_after_the_other_as_chat_does(model: str, tmp_path: Path) -> None:
    greedy = AnswerOptions(Sampling(greedy=True, max_new_tokens=8))
    records = answer(model, tmp_path, options=greedy)
    assert [record["question_id"] for record in records] == [question.id for question in ASKED]
    chat = load_for_chat(model)
    settings = apply_sampling(chat.generation_config, greedy.sampling)
    for question, record in zip(ASKED, records, strict=True):
        history = list(question.before)
        for turn, text in enumerate(question.turns):
            history.append(Message("user", text))
            expected = generate_answer(chat, history, settings)
            assert record["choices"][0]["turns"][turn] == expected.text
            assert record["finish"][turn] == expected.finish
            assert (record["tokens"][turn], record["prompt_tokens"][turn]) == (expected.tokens, expected.prompt_tokens)
            history.append(Message("assistant", expected.text))


def test_an_interrupted_file_is_continued_to_the_same_answers(
    model: str, whole: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupt the second batch, cut the last line, and continue with another size of batches and more questions."""
    computed: list[Question] = []
    answer_batch = answer_run.answer_batch

    def interrupted(*arguments: Any) -> Any:
        if computed:
            raise KeyboardInterrupt
        computed.extend(arguments[2])
        return answer_batch(*arguments)

    monkeypatch.setattr(answer_run, "answer_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answer(model, tmp_path, ASKED[:6])
    assert "3 of 6 answers are kept; the same command continues." in capsys.readouterr().err
    file = tmp_path / "small.jsonl"
    data = file.read_bytes()
    assert data.count(b"\n") == 3
    file.write_bytes(data[:-5])
    monkeypatch.setattr(answer_run, "answer_batch", answer_batch)
    assert answer(model, tmp_path, options=AnswerOptions(SAMPLED.sampling, batch_size=7)) == whole
    before = file.read_bytes()
    monkeypatch.setattr(answer_run, "load_for_chat", None)
    assert answer(model, tmp_path) == whole
    assert file.read_bytes() == before


def test_other_settings_and_other_questions_are_refused(model: str, tmp_path: Path) -> None:
    answer(model, tmp_path, ASKED[:2])
    before = (tmp_path / "small.jsonl").read_bytes()
    reseeded = AnswerOptions(Sampling(temperature=1.2, max_new_tokens=8, seed=4))
    warmer = AnswerOptions(Sampling(temperature=1.5, max_new_tokens=8, seed=3))
    for asked, options, message in (
        (ASKED[:2], warmer, "made with generation"),
        (ASKED[:2], reseeded, "made with seed 3, now it is 4"),
        ([ASKED[0], Question(1, ("another",))], SAMPLED, "question 1 was another one then"),
        (ASKED[1:3], SAMPLED, "question 0 is not in the file of questions"),
    ):
        with pytest.raises(UserError, match=message):
            answer(model, tmp_path, asked, options)
    assert (tmp_path / "small.jsonl").read_bytes() == before


def test_names_of_files_are_short_and_differ() -> None:
    assert file_names(["runs/a", "org/b"]) == ["a", "b"]
    assert file_names(["x/run", "y/run", "z"]) == ["x-run", "y-run", "z"]
    with pytest.raises(UserError, match="named twice"):
        file_names(["runs/a", "./runs/../runs/a"])


# Files of questions


def write(path: Path, *records: Any) -> Path:
    text = "".join(f"{record if isinstance(record, str) else json.dumps(record)}\n" for record in records)
    path.write_text(text, encoding="utf-8")
    return path


def test_every_form_of_a_question(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "Rules."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "2"},
    ]
    found = read_questions(
        write(
            tmp_path / "q.jsonl",
            {"prompt": "p"},
            {"question_id": 9, "category": "math", "turns": ["a", "b"], "reference": ["x", "y"]},
            {"id": "m", "messages": messages},
            {"task_id": "HumanEval/0", "prompt": "def f():", "system": "Code."},
            {"instruction": "Sum up", "input": "text"},
            {"prompt": messages[1:2]},
            {"question": "Who?", "context": "Ada did.", "system_prompt": "Code."},
            {"messages": messages[1:2], "system": "Code.", "prompt": "one"},
        )
    )
    before = (Message("system", "Rules."), Message("user", "one"), Message("assistant", "1"))
    assert found == [
        Question(1, ("p",)),
        Question(9, ("a", "b"), (), "math", ("x", "y")),
        Question("m", ("two",), before, "", ("2",)),
        Question("HumanEval/0", ("def f():",), (Message("system", "Code."),)),
        Question(5, ("Sum up\n\ntext",)),
        Question(6, ("one",)),
        Question(7, ("Who?\n\nAda did.",), (Message("system", "Code."),)),
        Question(8, ("one",), (Message("system", "Code."),)),
    ]


def test_real_question_files_read_as_they_are(shared_data: Path) -> None:
    vicuna = read_questions(shared_data / "judge" / "vicuna_bench_question.jsonl")
    assert [question.id for question in vicuna] == list(range(1, 81))
    mt_bench = read_questions(shared_data / "judge" / "mt_bench_question.jsonl")
    assert {len(question.turns) for question in mt_bench} == {2}
    assert sum(bool(question.references) for question in mt_bench) == 39


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "the file is empty"),
        (["\n"], "holds no questions"),
        (['{"prompt": "a"}', '{"prompt": '], ":2: "),
        ([{"text": "a", "label": 1}], "has `text`, `label`, and no question"),
        ([{"prompt": "  "}], "`prompt` is empty"),
        ([{"prompt": 7}], "`prompt` is a number, expected text"),
        ([{"turns": []}], "`turns` is an empty list"),
        ([{"turns": ["a", 2]}], r"`turns\[1\]` is a number"),
        ([{"question_id": 1, "prompt": "a"}, {"question_id": "1", "prompt": "b"}], "the id '1' is that of .*:1 too"),
        ([{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}], "`messages` and `prompt` ask different"),
        ([{"prompt": "a", "question": "b"}], "`prompt` and `question` ask different"),
        ([{"prompt": "a", "history": [["b", "c"]]}], "`history` is not read"),
        ([{"prompt": "a", "tools": [{"name": "f"}]}], "`tools` defines tools"),
        (
            [{"system": "a", "messages": [{"role": "system", "content": "b"}, {"role": "user", "content": "c"}]}],
            "system message differ",
        ),
        ([{"question_id": True, "prompt": "a"}], "expected text or an integer"),
        ([{"messages": [{"role": "assistant", "content": "a"}]}], "the roles of `messages` are assistant"),
        ([{"messages": [{"role": "robot", "content": "a"}]}], "has the role 'robot'"),
        ([{"messages": [{"role": "system", "content": "a"}]}], "the roles of `messages` are system"),
    ],
)
def test_a_bad_question_file(tmp_path: Path, records: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_questions(write(tmp_path / "q.jsonl", *records))


# The command


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_scripted(tmp_path_factory.mktemp("scripted") / "tag", "Tag", context=1500)


def test_the_command_answers_with_several_models(
    scripted: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = write(tmp_path / "q.jsonl", {"prompt": "one"}, {"prompt": "two"})
    dialogue = tmp_path / "dialogue.txt"
    dialogue.write_text("Human: Hi\n\nAssistant: Hello.\n", encoding="utf-8")
    arguments = ("generate", questions, "--models", scripted, model, "-o", tmp_path / "out", "--greedy", "--json")
    more = ("--max-new-tokens", 4, "--prompting", f"{model}=dialogue", "--dialogue-file", dialogue)
    done = peftchat_in_process(capsys, *arguments, *more)
    assert done.returncode == 0, done.stderr
    first, second = [json.loads(line) for line in done.stdout.splitlines()]
    assert (first["model"], first["prompting"], first["ended_by_itself"]) == ("tag", "template", 1.0)
    assert (second["model"], second["prompting"]) == ("small", "dialogue")
    assert second["prompt_tokens_per_turn"] > 2 * first["prompt_tokens_per_turn"]
    lines = (tmp_path / "out" / "tag.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["choices"][0]["turns"] for line in lines] == [["Tag"], ["Tag"]]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "small.json", "small.jsonl", "tag.json", "tag.jsonl",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--models", "nowhere/at/all"], "there is no such folder"),
        (["--models", "MODEL", "MODEL"], "named twice"),
        (["--models", "MODEL", "--prompting", "chat"], "expected template or dialogue, got 'chat'"),
        (["--models", "MODEL", "--prompting", "other=dialogue"], "there is no model 'other' here"),
        (["--models", "MODEL", "--dialogue-file", "QUESTIONS"], "no model is asked by a dialogue"),
        (["--models", "MODEL", "--prompting", "dialogue", "--dialogue-file", "QUESTIONS"], "begins with `Human:`"),
        (["--models", "MODEL", "--prompting", "dialogue"], "begin the dialogue with a shorter text"),
        (["--models", "BASE"], "has no chat template"),
        (["--models", "MODEL", "--output", "QUESTIONS"], "the output is the file of questions"),
        (["--models", "MODEL", "--greedy", "--temperature", "1"], "--greedy does not sample"),
    ],
)
def test_a_mistake_is_told_before_anything_is_written(
    more: list[str],
    message: str,
    model: str,
    pretrained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    questions = write(tmp_path / "q.jsonl", {"prompt": "one"})
    names = {"MODEL": model, "BASE": str(pretrained), "QUESTIONS": str(questions)}
    monkeypatch.setattr(answer_run, "load_for_chat", None)
    arguments = [names.get(word, word) for word in more]
    done = peftchat_in_process(capsys, "generate", questions, "-o", tmp_path / "out", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == [questions]
