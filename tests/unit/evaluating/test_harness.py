"""Tasks on a small model: the same scores as the harness's own command line, kept answers, mistakes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from peftchat.errors import UserError
from peftchat.evaluating.card_results import write_results
from peftchat.evaluating.evaluated_model import EvaluatedModel
from peftchat.evaluating.harness import AskOptions
from peftchat.evaluating.kept_answers import KeptAnswers
from peftchat.evaluating.run_evaluation import EvaluateOptions, Watch, evaluate_models
from peftchat.evaluating.side_by_side import Evaluation
from peftchat.evaluating.task_catalog import TaskSpec, load_tasks, parse_tasks, unknown_task
from tests.support.chat_models import in_format, save_adapter_run, save_model
from tests.support.cli import PROJECT
from tests.support.tokenizers import byte_level

pytest.importorskip("lm_eval", reason="needs the extra `evaluate`")

QUESTIONS = [
    {"ask": f"What is {first} plus {second}?", "options": [str(first + second), "a cat", "nine and a half"],
     "right": place % 3, "text": f"text {place // 4}"}
    for place, (first, second) in enumerate(zip(range(16), range(3, 19), strict=True))
]  # fmt: skip

CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{{{ask}}}}\\nAnswer:"
doc_to_choice: "{{{{options}}}}"
doc_to_target: right
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0, {more}}}
"""

WRITING = """
task: writing
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: generate_until
doc_to_text: "{{{{ask}}}}"
doc_to_target: "{{{{options[0]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""

GROUP = "group: both\ntask: [sums, related]\naggregate_metric_list:\n  - {metric: acc, weight_by_size: true}\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an adapter run on another base, and task files."""
    folder = tmp_path_factory.mktemp("harness")
    save_model(folder / "model")
    save_adapter_run(folder / "base", folder / "run", in_format(byte_level()))
    tasks = folder / "tasks"
    tasks.mkdir()
    data = tasks / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (tasks / "sums.yaml").write_text(CHOICE.format(name="sums", data=data, more=""))
    (tasks / "related.yaml").write_text(CHOICE.format(name="related", data=data, more="cluster: text"))
    (tasks / "writing.yaml").write_text(WRITING.format(data=data))
    (tasks / "both.yaml").write_text(GROUP)
    return folder


def evaluated(place: Path, name: str, output: Path, tasks: str = "sums", **options: Any) -> Any:
    watch = options.pop("watch", Watch())
    chosen = EvaluateOptions(tasks=tasks, include=[place / "tasks"], output=output, **options)
    return evaluate_models(str(place / name), chosen, watch)[0]


def test_scores_and_answers_are_those_of_the_harness(place: Path, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = evaluated(place, "model", tmp_path / "out", "sums@2,writing", ask=AskOptions(batch_size="4"))
    expected = {}
    for name, shots in (("sums", 2), ("writing", 0)):
        stock = simple_evaluate(
            "hf",
            model_args={"pretrained": str(place / "model"), "dtype": "auto"},
            tasks=[name],
            num_fewshot=shots,
            batch_size=4,
            device="cpu",
            task_manager=TaskManager(include_path=str(place / "tasks"), include_defaults=False),
        )
        expected[name] = stock
        rows = {row.task: row for row in found.tasks}
        for metric in rows[name].metrics:
            assert metric.values[0] == stock["results"][name][f"{metric.metric},none"]
            assert metric.stderrs[0] == stock["results"][name][f"{metric.metric}_stderr,none"]
    kept = [json.loads(line) for line in (tmp_path / "out" / "samples-1.jsonl").read_text().splitlines()]
    for name, stock in expected.items():
        ours = {sample["question"]: sample["answers"] for sample in kept if sample["task"] == name}
        theirs = {sample["doc_id"]: sample["filtered_resps"] for sample in stock["samples"][name]}
        assert ours == json.loads(json.dumps(theirs, default=str), object_hook=lambda pairs: {
            int(key): value for key, value in pairs.items()
        })  # fmt: skip


def test_an_adapter_is_asked_as_stock_peft_computes_it(place: Path) -> None:
    """Log-likelihoods are those of base, adapter and the embeddings of added tokens, one by one."""
    import torch
    from lm_eval.api.instance import Instance

    from peftchat.evaluating.harness_model import HarnessModel

    model = EvaluatedModel.open(str(place / "run"))
    loaded, tokenizer = model.load(), model.tokenizer()
    asked = [("<|user|>\nWhat is two?<|end|>\n<|assistant|>\n", "It is two.<|end|>"), ("Once", " upon a time")]
    requests = [
        Instance("loglikelihood", doc={}, arguments=pair, idx=number, metadata=("task", number, 1))
        for number, pair in enumerate(asked)
    ]
    with KeptAnswers(place / "none.jsonl") as kept:
        harness = HarnessModel(loaded, tokenizer, batch_size="2", answers=kept, on_answer=lambda count: None)
        answers = harness.loglikelihood(requests)
    for (context, continuation), (likelihood, _) in zip(asked, answers, strict=True):
        # The harness counts white space at the end of the context to the continuation.
        before = tokenizer(context.rstrip())["input_ids"]
        ids = torch.tensor([tokenizer(context + continuation)["input_ids"]])
        with torch.no_grad():
            chances = loaded(input_ids=ids).logits[0].log_softmax(-1)
        rows = range(len(before) - 1, ids.shape[1] - 1)
        expected = sum(float(chances[row, ids[0, row + 1]]) for row in rows)
        assert likelihood == pytest.approx(expected, abs=1e-4)


def test_a_run_is_compared_with_its_base_by_question(place: Path, tmp_path: Path) -> None:
    found = evaluated(place, "run", tmp_path / "out", "both")
    assert [model.name for model in found.models] == [str(place / "run"), "base"]
    rows = {row.task: row for row in found.tasks}
    assert [row.task for row in found.shown] == ["both"]
    assert rows["related"].clusters == 4
    assert rows["sums"].clusters is None
    difference = rows["sums"].metrics[0].differences[0]
    by_model = [
        [json.loads(line) for line in (tmp_path / "out" / f"samples-{number}.jsonl").read_text().splitlines()]
        for number in (1, 2)
    ]
    ours, theirs = ([sample["acc"] for sample in samples if sample["task"] == "sums"] for samples in by_model)
    assert difference is not None
    assert difference.higher == sum(one > other for one, other in zip(ours, theirs, strict=True))
    assert difference.mean == pytest.approx((sum(ours) - sum(theirs)) / 16)
    for name in ("results.md", "results.svg"):
        assert "both" in (tmp_path / "out" / name).read_text()
    check_card(tmp_path / "card" / "README.md", found, place)


def check_card(card: Path, found: Evaluation, place: Path) -> None:
    """The hub's own reader finds the results in the card; what a user wrote stays, and no path is written."""
    card.parent.mkdir()
    card.write_text("---\ntags:\n- chat\n---\n\n# My model\n\nMy words.\n\n## Limits\n\n- one\n")
    write_results(card, found)
    once = card.read_text()
    write_results(card, found)
    assert card.read_text() == once
    read = ModelCard(once)
    name, results = model_index_to_eval_results(read.data.to_dict()["model-index"])
    row = next(row for row in found.tasks if row.task == "both")
    assert name == "card"
    assert [(one.metric_name, one.metric_value) for one in results] == [("acc", round(row.metrics[0].values[0], 6))]
    assert "no chat template" in results[0].dataset_name
    assert read.data.tags == ["chat"]
    assert "My words." in read.text
    assert read.text.index("## Evaluation") < read.text.index("## Limits")
    assert str(place.parent) not in once


def test_an_interrupted_evaluation_asks_only_what_is_missing(place: Path, tmp_path: Path) -> None:
    whole = evaluated(place, "model", tmp_path / "whole", ask=AskOptions(batch_size="1"))
    shutil.copytree(tmp_path / "whole" / "answers", tmp_path / "part" / "answers")
    (file,) = (tmp_path / "part" / "answers").iterdir()
    lines = file.read_text().splitlines(keepends=True)
    # The process was killed within a line.
    file.write_text("".join(lines[:20]) + lines[20][:25])
    calls: list[int] = []
    again = evaluated(
        place, "model", tmp_path / "part", ask=AskOptions(batch_size="1"), watch=Watch(on_answer=calls.append)
    )
    assert calls[0] == 20
    assert len(calls) - 1 == len(lines) - 20
    assert again.tasks == whole.tasks
    # The texts of other shots are others, so no kept answer is taken for them.
    calls.clear()
    evaluated(place, "model", tmp_path / "part", "sums@1", watch=Watch(on_answer=calls.append))
    assert calls[0] == 0


def test_a_changed_model_takes_no_kept_answers(place: Path, tmp_path: Path) -> None:
    key = EvaluatedModel.open(str(place / "model")).key()
    other = save_model(tmp_path / "other", num_hidden_layers=1)
    assert EvaluatedModel.open(str(other)).key() != key
    assert EvaluatedModel.open(str(place / "model")).key() == key


def test_a_prompt_that_does_not_fit_is_counted(place: Path, tmp_path: Path) -> None:
    short = save_model(tmp_path / "short", max_position_embeddings=24)
    found = evaluated(place, str(short), tmp_path / "out")
    assert found.models[0].cut > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tasks": "sums@20"}, "20 shots are asked for, and the task has 16 examples"),
        ({"tasks": "sums,both"}, "sums is a part of both"),
        ({"cluster": "page"}, "the questions have no field 'page'"),
        ({"ask": AskOptions(system="Be brief.")}, "a system prompt needs a chat template"),
        ({"against": ["model"], "alone": True}, "a comparison is asked for, and none"),
    ],
)
def test_a_mistake_is_told_before_a_model_is_loaded(
    place: Path, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    loaded: list[EvaluatedModel] = []
    with pytest.raises(UserError, match=said):
        evaluated(place, "model", tmp_path / "out", watch=Watch(on_model=loaded.append), **options)
    assert not loaded
    assert not (tmp_path / "out").exists()


def test_a_task_without_its_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(CHOICE.format(name="own", data=tmp_path / "none.jsonl", more=""))
    with pytest.raises(UserError, match=r"the task's data is not there.*none\.jsonl"):
        load_tasks([TaskSpec("own")], [tmp_path])
    hub = CHOICE.format(name="own", data="x.jsonl", more="").replace("path: json", "path: nobody/nothing")
    (tmp_path / "own.yaml").write_text(hub)
    with pytest.raises(UserError, match="not on this disk"):
        load_tasks([TaskSpec("own")], [tmp_path])


@pytest.mark.parametrize(
    ("right", "said"),
    [("5", "question 2 has 2 choices, and its right one is number 5"), ('"z"', "question 2 has no choice 'z'")],
)
def test_a_target_that_no_choice_has_is_refused(right: str, said: str, tmp_path: Path) -> None:
    """The harness would count it as wrong for every model."""
    data = tmp_path / "questions.jsonl"
    first = "1" if right == "5" else '"x"'
    rows = [json.dumps({"ask": "a", "options": ["x", "y"], "right": json.loads(part)}) for part in (first, right)]
    data.write_text("\n".join(rows) + "\n")
    (tmp_path / "own.yaml").write_text(CHOICE.format(name="own", data=data, more=""))
    with pytest.raises(UserError, match=said):
        load_tasks([TaskSpec("own")], [tmp_path])


def test_a_damaged_task_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("task: own\n  metric_list: [\n")
    with pytest.raises(UserError, match=r"own\.yaml: the task file cannot be read"):
        load_tasks([TaskSpec("own")], [tmp_path])


def test_names_of_tasks() -> None:
    assert parse_tasks("a@5, b,") == [TaskSpec("a", 5), TaskSpec("b")]
    for text in ("", "a b", "a@x", "a,a@3"):
        with pytest.raises(UserError):
            parse_tasks(text)
    assert "hellaswag" in str(unknown_task("helaswag", ["arc_easy", "hellaswag", "mmlu"]))


def test_the_task_file_of_the_documentation_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (PROJECT / "docs" / "evaluate.md").read_text(encoding="utf-8")
    (block,) = (part for part in page.split("```") if "task: own_arc" in part and "dataset_path" in part)
    (tmp_path / "own_arc.yaml").write_text(block.removeprefix("text"))
    rows = [{"query": f"Question: {number}?", "choices": ["one", "two"], "gold": number % 2} for number in range(8)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    (chosen,) = load_tasks([TaskSpec("own_arc", 5)], [tmp_path])
    task = chosen.tasks["own_arc"]
    assert task.doc_to_text(rows[1]) == "Question: 1?\nAnswer:"
    assert task.doc_to_choice(rows[1]) == ["one", "two"]
    assert task.doc_to_target(rows[1]) == 1
