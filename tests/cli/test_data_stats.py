"""`peftchat data stats`: counts equal slow ones, duplicates and leaks are found and named, bad records are counted."""

import itertools
import json
import random
import statistics
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from peftchat.conversations import read_conversations
from peftchat.conversations.stats import gather, parts_of_path
from peftchat.conversations.stats.lengths import LengthSketch
from peftchat.conversations.stats.overlap import run_hashes, word_hashes
from peftchat.errors import UserError
from tests.support.cli import peftchat
from tests.support.data import CONVERSATIONS, write_conversations
from tests.support.in_process import peftchat_in_process
from tests.support.recipes import write_recipe
from tests.support.tokenizers import save_tokenizer

Turns = list[tuple[str, str]]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return peftchat("data", "stats", *arguments)


def stats_of(*paths: Path, against: list[Path] | None = None) -> dict[str, Any]:
    parts = [part for path in paths for part in parts_of_path(str(path))]
    return gather(parts, [str(path) for path in against or ()]).as_dict()


def words(count: int, seed: int) -> str:
    source = random.Random(seed)
    return " ".join(f"w{source.randrange(10**6)}" for _ in range(count))


def conversation(seed: int, length: int = 60) -> Turns:
    return [("user", words(12, seed)), ("assistant", words(length, seed + 10**6))]


def test_counts_equal_slow_ones(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "oasst1_guanaco_multilingual_500.jsonl"
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    done = run(source, "--tokenizer", tokenizer, "--json")
    assert done.returncode == 0, done.stderr
    (part,) = json.loads(done.stdout)["parts"]
    conversations = list(read_conversations(source))
    lengths = [sum(len(message.content) for message in one.messages) for one in conversations]
    assert part["conversations"] == part["records"] == len(conversations)
    assert part["formats"] == {str(source): "guanaco"}
    assert (part["characters"]["total"], part["characters"]["max"]) == (sum(lengths), max(lengths))
    assert part["characters"]["median"] == pytest.approx(statistics.median(lengths), rel=0.02)
    assert sum(count for *_, count in part["characters"]["histogram"]) == len(conversations)
    assert part["turns"]["total"] == sum(len(one.messages) for one in conversations)
    roles = Counter(message.role for one in conversations for message in one.messages)
    assert {role: told["messages"] for role, told in part["roles"].items()} == roles
    stock = AutoTokenizer.from_pretrained(tokenizer)
    tokens = {
        one.source: sum(len(stock.encode(message.content, add_special_tokens=False)) for message in one.messages)
        for one in conversations
    }
    assert part["tokens"]["total"] == sum(tokens.values())
    longest = sorted(tokens.values(), reverse=True)[:5]
    assert [row["tokens"] for row in part["longest"]] == longest
    assert all(tokens[row["where"]] == row["tokens"] for row in part["longest"])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=200))
def test_sketches_stay_within_their_error(values: list[int]) -> None:
    sketch = LengthSketch()
    for value in values:
        sketch.add(value)
    assert (sketch.count, sketch.total, sketch.smallest, sketch.largest) == (
        len(values),
        sum(values),
        min(values),
        max(values),
    )
    for share in (0.0, 0.05, 0.5, 0.95, 1.0):
        exact = sorted(values)[int(share * (len(values) - 1))]
        assert sketch.quantile(share) == pytest.approx(exact, rel=0.02, abs=0.5)
    bars = sketch.histogram()
    assert sum(count for *_, count in bars) == len(values)
    assert all(first <= last for first, last, _ in bars)
    assert all(before[1] + 1 == after[0] for before, after in itertools.pairwise(bars))


def test_exact_duplicates_are_counted_and_named(tmp_path: Path) -> None:
    source = write_conversations(
        tmp_path / "d.jsonl", [conversation(1), conversation(2), conversation(1), conversation(3), conversation(1)]
    )
    (part,) = stats_of(source)["parts"]
    assert part["exact_duplicates"] == 2
    assert part["duplicate_examples"] == [(f"{source}:3", f"{source}:1"), (f"{source}:5", f"{source}:1")]
    assert part["near_duplicates"] in (0, None)


def jaccard(one: Turns, other: Turns) -> float:
    """Similarity of the runs of five words, by sets."""
    runs = []
    for side in (one, other):
        text = " ".join(content for _, content in side).split()
        runs.append({tuple(text[place : place + 5]) for place in range(len(text) - 4)})
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


def test_near_duplicates_are_found_where_sets_say_so(tmp_path: Path) -> None:
    pytest.importorskip("rensa")
    originals = [conversation(seed, 80) for seed in range(0, 400, 2)]
    rows, alike, different = [], 0, 0
    for number, original in enumerate(originals):
        text = original[1][1].split()
        for place in random.Random(number).sample(range(len(text)), number % 12):
            text[place] = "changed"
        changed = [original[0], ("assistant", " ".join(text))]
        rows += [original, changed]
        similarity = jaccard(original, changed)
        alike += 0.8 <= similarity < 1
        different += similarity < 0.55
    found = stats_of(write_conversations(tmp_path / "d.jsonl", rows))["parts"][0]
    exact = sum(number % 12 == 0 for number in range(len(originals)))
    assert found["exact_duplicates"] == exact
    assert alike * 0.97 <= found["near_duplicates"] <= len(originals) - exact - different * 0.97
    assert alike > 20 and different > 20


def test_leaks_between_train_and_eval_are_told(tmp_path: Path) -> None:
    train = write_conversations(tmp_path / "train.jsonl", [conversation(seed) for seed in range(20)])
    same_start = [conversation(3)[0], ("assistant", "something else")]
    leaky = write_conversations(tmp_path / "eval.jsonl", [conversation(5), same_start, conversation(100)])
    stats = stats_of(train, leaky)
    (overlap,) = stats["overlaps"]
    assert (overlap["first"], overlap["second"]) == (str(train), str(leaky))
    assert (overlap["same"], overlap["same_start"]) == (1, 2)
    assert overlap["examples"] == [(f"{leaky}:1", f"{train}:6"), (f"{leaky}:2", f"{train}:4")]
    clean = write_conversations(tmp_path / "clean.jsonl", [conversation(200)])
    (overlap,) = stats_of(train, clean)["overlaps"]
    assert (overlap["same"], overlap["same_start"]) == (0, 0)
    # A folder with both files, and a recipe that names them, are compared in the same way.
    clean.unlink()
    assert [one["same"] for one in stats_of(tmp_path)["overlaps"]] == [1]


def test_a_recipe_brings_both_sides_and_its_tokenizer(tmp_path: Path) -> None:
    model = save_tokenizer(tmp_path / "model")
    train = write_conversations(tmp_path / "d.jsonl", CONVERSATIONS)
    held_out = write_conversations(tmp_path / "e.jsonl", CONVERSATIONS[:1])
    data = {"train": [{"path": str(train), "weight": 3}], "eval": [{"path": str(held_out)}]}
    done = run(write_recipe(tmp_path / "recipe.yaml", model, train, data=data), "--json")
    assert done.returncode == 0, done.stderr
    stats = json.loads(done.stdout)
    assert [(part["name"], part["conversations"]) for part in stats["parts"]] == [("train", 3), ("eval", 1)]
    assert all(part["tokens"]["total"] > 0 for part in stats["parts"])
    assert stats["overlaps"][0]["same"] == 1
    split = write_recipe(tmp_path / "split.yaml", model, train, data={"eval_fraction": 0.4})
    parts = json.loads(run(split, "--json").stdout)["parts"]
    assert sum(part["conversations"] for part in parts) == 3 and all(part["conversations"] for part in parts)


def test_benchmark_questions_in_answers_are_found(tmp_path: Path) -> None:
    questions = [words(30, 1000 + number) for number in range(50)]
    short = [words(9, 2000 + number) for number in range(20)]
    boilerplate = words(13, 3000)
    rows = [{"query": f"{boilerplate} {question}", "gold": 1} for question in questions]
    rows += [{"nested": {"choices": [question, "yes"]}} for question in short]
    bench = tmp_path / "bench.jsonl"
    bench.write_text("".join(json.dumps(row) + "\n" for row in rows))
    thirteen = " ".join(questions[7].split()[5:18]).upper().replace(" ", ", ")
    twelve = " ".join(questions[8].split()[5:17])
    data = write_conversations(
        tmp_path / "d.jsonl",
        [
            [("user", "q"), ("assistant", f"so: {thirteen}!")],
            [("user", twelve), ("assistant", "no")],
            [("user", f"and {short[3]}?"), ("assistant", "yes")],
            [("user", boilerplate), ("assistant", "which all questions share")],
            [("user", " ".join(str(number) for number in range(40))), ("assistant", "numbers")],
        ],
    )
    (found,) = stats_of(data, against=[bench])["benchmarks"]
    assert (found["questions"], found["found"], found["conversations"]) == (70, 2, 2)
    assert found["examples"] == ((f"{data}:1", f"{bench}:8"), (f"{data}:3", f"{bench}:54"))


def test_real_benchmarks_are_found_in_themselves_and_not_elsewhere(shared_data: Path, tmp_path: Path) -> None:
    bench = shared_data / "eval" / "arc_easy_400.jsonl"
    queries = [json.loads(line)["query"] for line in bench.read_text().splitlines()][:60]
    long_enough = [query for query in queries if len(query.split()) > 15]
    leaky = write_conversations(tmp_path / "d.jsonl", [[("user", query), ("assistant", "A")] for query in long_enough])
    (found,) = stats_of(leaky, against=[bench])["benchmarks"]
    assert found["conversations"] == len(long_enough) > 30
    (clean,) = stats_of(shared_data / "oasst1_guanaco_multilingual_500.jsonl", against=[bench])["benchmarks"]
    assert clean["found"] == 0


def test_run_hashes_equal_where_words_do(tmp_path: Path) -> None:
    text = "The quick, brown fox; THE QUICK brown fox"
    runs = run_hashes(word_hashes(text), 4)
    assert len(runs) == 5
    assert runs[0] == runs[4] and len(set(runs.tolist())) == 4
    assert run_hashes(word_hashes("one two"), 3).dtype == np.uint64


def test_code_and_bad_records_are_counted(tmp_path: Path) -> None:
    source = write_conversations(
        tmp_path / "d.jsonl",
        [[("user", "q"), ("assistant", "see\n```python\n12345\n```\nend")], [("user", "a ``` b"), ("assistant", "c")]],
    )
    with source.open("a") as file:
        file.write('not json\n{"messages": [{"role": "user", "content": "alone"}]}\n')
    done = run(source, "--json")
    assert done.returncode == 0
    (part,) = json.loads(done.stdout)["parts"]
    assert (part["with_code"], part["code_characters"]) == (1, len("12345\n"))
    assert part["problems"] == {"not_json": 1, "no_answer": 1}
    assert part["problem_examples"]["not_json"][0].startswith(f"{source}:3: ")
    assert (part["records"], part["conversations"]) == (4, 2)
    table = run(source)
    assert f"{source}:4" in table.stdout.replace("\n", "") and "invalid records" in table.stdout


def test_the_page_is_whole_and_needs_nothing(tmp_path: Path) -> None:
    source = write_conversations(tmp_path / "<b>.jsonl", [conversation(seed, 5 + seed) for seed in range(50)])
    page = tmp_path / "stats.html"
    done = run(source, source, "--html", page)
    assert done.returncode == 0 and done.stdout == ""
    text = page.read_text()
    assert "<b>.jsonl" not in text and "&lt;b&gt;.jsonl" in text
    assert "http" not in text and "<script" not in text
    assert text.count("<svg") == 4 and "50 identical conversations" in text


@pytest.mark.parametrize(
    "arguments", [["none.jsonl"], ["d.jsonl", "--benchmark", "none.jsonl"], ["d.jsonl", "--tokenizer", "x"]]
)
def test_bad_input_is_one_message(tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_conversations(tmp_path / "d.jsonl", CONVERSATIONS)
    done = run(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert "Error: " in done.stderr and "Traceback" not in done.stderr


def test_a_benchmark_without_questions_is_refused(tmp_path: Path) -> None:
    bench = tmp_path / "b.jsonl"
    bench.write_text('{"query": "too short"}\n')
    source = write_conversations(tmp_path / "d.jsonl", CONVERSATIONS)
    with pytest.raises(UserError, match="8 words"):
        stats_of(source, against=[bench])


def test_what_was_changed_or_not_used_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"role": role, "content": "text"} for role in ("user", "assistant", "user")]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns, "notes": "n"}) + "\n")
    shown = peftchat_in_process(capsys, "data", "stats", tmp_path / "rows.jsonl").stdout
    assert "1 changed: an unanswered user turn at the end taken off" in shown
    assert "not used: field 'notes' in 1 (first" in " ".join(shown.split())
