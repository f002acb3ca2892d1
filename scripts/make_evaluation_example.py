"""Evaluate a run from end to end and print the tables of docs/evaluate.md.

`python scripts/make_evaluation_example.py RUN EVAL.jsonl -o FOLDER` takes a finished run and held-out conversations. It
asks the run and its base a task made of these conversations, has both answer their questions (the base prompted by a
dialogue), and has a judge compare the answers after an exam. All by the commands that a user types, which are printed.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from peftchat.cli.main import cli
from peftchat.recipe import load_recipe

TASK = """task: which_answer
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{query}}}}\\n"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
CHOICES = 4


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
    """Write the task and its questions, the questions to answer, and the judge's exam."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for place, (query, answer) in enumerate(turns):
        # The answers of the next conversations are wrong ones; the right one moves through all places.
        others = [turns[(place + step) % len(turns)][1] for step in range(1, CHOICES)]
        gold = place % CHOICES
        lines.append({"query": query, "choices": [*others[:gold], answer, *others[gold:]], "gold": gold})
    write_lines(folder / "task.jsonl", lines)
    (folder / "tasks").mkdir(exist_ok=True)
    task = TASK.format(data=json.dumps(str((folder / "task.jsonl").absolute())))
    (folder / "tasks" / "which_answer.yaml").write_text(task, encoding="utf-8")
    asked = [{"question_id": place, "turns": [query]} for place, (query, _) in enumerate(turns[:questions])]
    write_lines(folder / "questions.jsonl", asked)
    known = [
        {"prompt": query, "good": answer, "bad": turns[(place + 1) % len(turns)][1]}
        for place, (query, answer) in enumerate(turns[:exam])
    ]
    write_lines(folder / "exam.jsonl", known)


def write_lines(path: Path, records: Sequence[object]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def peftchat(*arguments: object) -> None:
    """Run a command in this process, which has imported the libraries, after printing it."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ peftchat {shlex.join(words)}", flush=True)
    cli.main(words, prog_name="peftchat", standalone_mode=False)


def main() -> None:
    """Make the inputs, and run the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run")
    parser.add_argument("conversations", type=Path, help="held-out conversations (messages)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the inputs and the results")
    parser.add_argument("--judge", help="endpoint (http…/v1) or model  [default: the run's base]")
    parser.add_argument("--questions", type=int, default=8, help="questions that both answer and the judge compares")
    parser.add_argument("--exam", type=int, default=4, help="pairs of the judge's exam")
    parser.add_argument("--task-questions", type=int, default=40, help="questions of the task")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="most tokens of an answer, and of a reply")
    options = parser.parse_args()
    folder: Path = options.output
    turns = first_turns(options.conversations)[: options.task_questions]
    if len(turns) < max(CHOICES, options.questions, options.exam):
        sys.exit(f"{options.conversations} has {len(turns)} questions with an answer; give a longer file")
    write_inputs(turns, folder, options.questions, options.exam)
    base = load_recipe(options.run / "recipe.yaml", to_train=False, upgrade=True).recipe.model.name
    answers = folder / "answers"
    peftchat(
        "generate", folder / "questions.jsonl", "--models", base, options.run, "--prompting", f"{base}=dialogue",
        "--greedy", "--dtype", "float32", "--max-new-tokens", options.max_new_tokens, "-o", answers,
    )  # fmt: skip
    files = sorted(answers.glob("*.jsonl"), key=lambda file: file.stem != Path(base).name)
    peftchat(
        "judge", *files, "--judge", options.judge or base, "--prompt", "verdict", "--exam", folder / "exam.jsonl",
        "--max-tokens", options.max_new_tokens, "-o", folder / "judged",
    )  # fmt: skip
    peftchat(
        "evaluate", options.run, "--include", folder / "tasks", "--tasks", "which_answer", "-o", folder / "evaluated"
    )


if __name__ == "__main__":
    main()
