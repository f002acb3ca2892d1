"""Evaluate a run from end to end and print the tables of docs/evaluate.md.

    python scripts/make_evaluation_example.py RUN EVAL.jsonl -o FOLDER [--tasks FILE...] [--serve] [--harness]

It takes a finished run and held-out conversations. The run and its base answer questions of these conversations (the
base prompted by a dialogue) and tasks of the harness: one made of the conversations, and one for each file of
`--tasks`. A judge takes an exam and compares the answers. `--serve` puts the base behind the engine of `peftchat
serve`, and has it judge over HTTP. `--harness` asks the base the same tasks by the harness's own command line, and
fails unless all scores are equal. The commands are those that a user types, and are printed.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from peftchat.addresses import free_port
from peftchat.cli.main import cli
from peftchat.engines.commands import check_place, engine_command
from peftchat.engines.process import running
from peftchat.engines.served import open_served
from peftchat.errors import UserError, VerificationError
from peftchat.interruption import Interrupted
from peftchat.recipe import load_recipe

TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: multiple_choice
doc_to_text: {text}
doc_to_choice: {choices}
doc_to_target: {target}
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0{more}}}
"""
OWN_TASK = "which_answer"
CHOICES = 4


@dataclass(frozen=True)
class Form:
    """How the questions of a file become prompts and choices.

    Attributes:
        fields: that every question has.
        text: the prompt, as `doc_to_text`.
        choices: as `doc_to_choice`.
        target: as `doc_to_target`.
        more: of the metadata.
    """

    fields: tuple[str, ...]
    text: str
    choices: str
    target: str
    more: str = ""


FORMS = (
    Form(("query", "choices", "gold"), '"{{query}}\\nAnswer:"', '"{{choices}}"', "gold"),
    Form(("ctx", "endings", "label", "source_id"), '"{{ctx}}"', '"{{endings}}"', "label", ", cluster: source_id"),
    Form(("input", "output"), '"{{input}}"', "[A, B, C, D]", "output"),
)
"""ARC's questions, HellaSwag's, and MMLU's."""


def first_turns(path: Path) -> list[tuple[str, str]]:
    """Return the first question and answer of each conversation; questions and answers that repeat are left out."""
    found: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        roles = [message["role"] for message in messages[:2]]
        if roles == ["user", "assistant"] and messages[1]["content"] not in found.values():
            found.setdefault(messages[0]["content"], messages[1]["content"])
    return list(found.items())


def write_inputs(turns: Sequence[tuple[str, str]], folder: Path, questions: int, exam: int) -> None:
    """Write the task of the conversations, the questions to answer, and the judge's exam."""
    (folder / "tasks").mkdir(parents=True, exist_ok=True)
    lines = []
    for place, (query, answer) in enumerate(turns):
        # The answers of the next conversations are wrong ones; the right one moves through all places.
        others = [turns[(place + step) % len(turns)][1] for step in range(1, CHOICES)]
        gold = place % CHOICES
        lines.append({"query": query, "choices": [*others[:gold], answer, *others[gold:]], "gold": gold})
    write_lines(folder / "task.jsonl", lines)
    write_task(OWN_TASK, folder / "task.jsonl", folder)
    asked = [{"question_id": place, "turns": [query]} for place, (query, _) in enumerate(turns[:questions])]
    write_lines(folder / "questions.jsonl", asked)
    known = [
        {"prompt": query, "good": answer, "bad": turns[(place + 1) % len(turns)][1]}
        for place, (query, answer) in enumerate(turns[:exam])
    ]
    write_lines(folder / "exam.jsonl", known)


def write_task(name: str, data: Path, folder: Path) -> None:
    """Write the task file of a file of questions."""
    with data.open(encoding="utf-8") as file:
        fields = json.loads(file.readline())
    form = next((form for form in FORMS if set(form.fields) <= set(fields)), None)
    if form is None:
        sys.exit(f"{data}: expected the fields of ARC, HellaSwag or MMLU, got {', '.join(fields)}")
    text = TASK.format(
        name=name, data=json.dumps(str(data.absolute())), text=form.text, choices=form.choices, target=form.target,
        more=form.more,
    )  # fmt: skip
    (folder / "tasks" / f"{name}.yaml").write_text(text, encoding="utf-8")


def write_lines(path: Path, records: Sequence[object]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def peftchat(*arguments: object) -> None:
    """Run a command in this process, which has imported the libraries, after printing it."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ peftchat {shlex.join(words)}", flush=True)
    cli.main(words, prog_name="peftchat", standalone_mode=False)


def ask_harness(base: str, names: Sequence[str], folder: Path, limit: int) -> None:
    """Ask the base the tasks by the harness's own command line, and compare the scores with those of `evaluate`.

    Raises:
        VerificationError: a score differs.
    """
    ours = json.loads((folder / "evaluated" / "results.json").read_text(encoding="utf-8"))
    dtype = ours["models"][1]["dtype"]
    command = [
        "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={base},dtype={dtype}", "--include_path",
        str(folder / "tasks"), "--tasks", *names, "--limit", str(limit), "--batch_size", "8", "--device", "cpu",
        "--output_path", str(folder / "harness"),
    ]  # fmt: skip
    print(f"\n$ {shlex.join(command)}", flush=True)
    subprocess.run([sys.executable, "-m", *command], check=True)
    newest = max((folder / "harness").glob("*/results_*.json"), key=lambda path: path.stat().st_mtime)
    theirs = json.loads(newest.read_text(encoding="utf-8"))["results"]
    print("\n| task | metric | `peftchat evaluate`, base | `lm_eval`, base |\n| --- | --- | ---: | ---: |")
    unequal = []
    for task in ours["tasks"]:
        for metric in task["metrics"]:
            found, expected = metric["values"][1], theirs[task["task"]][f"{metric['metric']},none"]
            print(f"| {task['task']} | {metric['metric']} | {found:.4f} | {expected:.4f} |")
            unequal += [] if found == expected else [f"{task['task']} {metric['metric']}"]
    if unequal:
        raise VerificationError(f"the harness's command line has other scores of {', '.join(unequal)}")


@contextmanager
def served(base: str) -> Iterator[str]:
    """Serve a model over HTTP on loopback while the block runs; yields what `--judge` takes."""
    place = check_place("127.0.0.1", free_port("127.0.0.1", 8000, 100), None, needs_port=True)
    command = engine_command(open_served([base]), place, engine="transformers")
    print(f"\n$ peftchat serve {shlex.quote(base)} --engine transformers --port {place.port}", flush=True)
    with running(command, place) as engine:
        engine.wait_until_it_answers(600)
        yield f"{engine.url}#{command.models[0]}"


def judge(options: argparse.Namespace, by: str, answers: Sequence[Path]) -> None:
    """Have a judge compare the answers; one that writes nothing readable is a result too."""
    try:
        peftchat(
            "judge", *answers, "--judge", by, "--prompt", options.prompt, "--exam", options.output / "exam.jsonl",
            "--max-tokens", options.reply_tokens, "--concurrency", 1, "-o", options.output / "judged",
        )  # fmt: skip
    except VerificationError as error:
        print(f"Failed: {error}", flush=True)


def main() -> None:
    """Make the inputs, and run the commands."""
    # All commands share this process: tqdm, whose bars the harness shows, reads it when the first one imports it.
    os.environ["TQDM_DISABLE"] = "1"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run")
    parser.add_argument("conversations", type=Path, help="held-out conversations (messages)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the inputs and the results")
    parser.add_argument("--tasks", type=Path, nargs="*", default=[], help="files of ARC's, HellaSwag's, MMLU's form")
    parser.add_argument("--judge", help="endpoint (http…/v1) or model  [default: the run's base]")
    parser.add_argument("--serve", action="store_true", help="the base judges, served over HTTP")
    parser.add_argument("--prompt", default="general", help="the judge's prompt")
    parser.add_argument("--harness", action="store_true", help="compare scores with the harness's own command line")
    parser.add_argument("--questions", type=int, default=8, help="questions that both answer and the judge compares")
    parser.add_argument("--exam", type=int, default=4, help="pairs of the judge's exam")
    parser.add_argument("--task-questions", type=int, default=40, help="most questions of each task")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="most tokens of an answer")
    parser.add_argument("--reply-tokens", type=int, default=32, help="most tokens of the judge's reply")
    options = parser.parse_args()
    folder: Path = options.output
    turns = first_turns(options.conversations)
    if len(turns) < max(CHOICES, options.questions, options.exam):
        sys.exit(f"{options.conversations} has {len(turns)} questions with an answer; give a longer file")
    write_inputs(turns[: options.task_questions], folder, options.questions, options.exam)
    names = [OWN_TASK, *(file.stem for file in options.tasks)]
    for name, file in zip(names[1:], options.tasks, strict=True):
        write_task(name, file, folder)
    base = load_recipe(options.run / "recipe.yaml", to_train=False, upgrade=True).recipe.model.name
    answers = folder / "answers"
    peftchat(
        "generate", folder / "questions.jsonl", "--models", base, options.run, "--prompting", f"{base}=dialogue",
        "--greedy", "--dtype", "float32", "--max-new-tokens", options.max_new_tokens, "-o", answers,
    )  # fmt: skip
    peftchat(
        "evaluate", options.run, "--include", folder / "tasks", "--tasks", ",".join(names), "--limit",
        options.task_questions, "-o", folder / "evaluated",
    )  # fmt: skip
    if options.harness:
        ask_harness(base, names, folder, options.task_questions)
    # The base is A.
    files = sorted(answers.glob("*.jsonl"), key=lambda file: file.stem != Path(base).name)
    if options.serve:
        with served(base) as endpoint:
            judge(options, endpoint, files)
    else:
        judge(options, options.judge or base, files)


if __name__ == "__main__":
    try:
        main()
    except (UserError, VerificationError, Interrupted) as error:
        sys.exit(f"Error: {error}")
