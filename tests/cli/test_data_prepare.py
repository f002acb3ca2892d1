"""`peftchat data prepare` as a user runs it: what is written, what is counted, what is refused."""

import json
import random
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from peftchat.conversations import read_conversations
from peftchat.conversations.languages import detect_language, matches_language
from peftchat.conversations.prepare import FingerprintSet, PrepareOptions, prepare
from peftchat.errors import UserError
from tests.support.cli import peftchat


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return peftchat("data", "prepare", *arguments)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, count: int, questions: int) -> Path:
    rows = [{"prompt": f"question {number % questions}", "completion": f"answer {number}"} for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_trees_become_train_and_eval_files_and_a_card(tmp_path: Path, shared_data: Path) -> None:
    out = tmp_path / "out"
    source = shared_data / "oasst_trees_en_60.jsonl"
    done = run(source, "-o", out, "--languages", "en", "--eval-fraction", "0.1", "--json")
    assert done.returncode == 0, done.stderr
    card = json.loads(done.stdout)
    assert card == json.loads((out / "card.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == ["card.json", "card.md", "eval.jsonl", "train.jsonl"]
    train, held_out = (list(read_conversations(out / name)) for name in ("train.jsonl", "eval.jsonl"))
    assert (len(train), len(held_out)) == (card["train"]["conversations"], card["eval"]["conversations"])
    assert len(train) + len(held_out) == 312 == card["oasst"]["oasst_paths"] - sum(card["skipped"].values())
    assert not {d.messages[0] for d in train} & {d.messages[0] for d in held_out}
    expected = {d.messages for d in read_conversations(source)}
    assert {d.messages for d in train + held_out} == expected
    assert f"| conversations in train.jsonl | {len(train)} |" in (out / "card.md").read_text()


def test_bad_records_go_to_quarantine_and_every_record_is_in_a_count(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", 100, 50)
    with source.open("ab") as file:
        file.write(b'not json\n{"prompt": "question", "completion": ""}\n{"prompt": "\xff", "completion": "a"}\n')
        file.write(b'{"prompt": "question 0", "completion": "answer 0"}\n')
    done = run(source, "-o", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    card = json.loads(done.stdout)
    assert card["problems"] == {"not_json": 1, "not_utf8": 1, "empty_content": 1}
    assert card["skipped"] == {"duplicate": 1}
    kept = card["train"]["conversations"] + card["eval"]["conversations"]
    assert card["records"] == kept + sum(card["problems"].values()) + sum(card["skipped"].values()) == 104
    bad = rows_of(tmp_path / "out" / "quarantine.jsonl")
    assert [row["where"] for row in bad] == [f"{source}:{line}" for line in (101, 102, 103)]
    assert bad[0]["row"] == "not json\n"
    assert all(row["detail"] and not row["cut"] for row in bad)
    assert bad[2]["row"].startswith('{"prompt": "\\xff"')


def test_a_bad_record_of_a_table_is_shown_in_quarantine(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,completion\nasked,answered\nonly asked,\n")
    prepare(str(tmp_path / "rows.csv"), tmp_path / "out", PrepareOptions())
    (bad,) = rows_of(tmp_path / "out" / "quarantine.jsonl")
    assert (bad["kind"], bad["where"]) == ("empty_content", f"{tmp_path / 'rows.csv'}:3")
    assert json.loads(bad["row"]) == {"prompt": "only asked", "completion": ""}


def test_strict_stops_with_status_2_and_writes_nothing(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text('{"prompt": "a", "completion": "b"}\nnot json\n')
    done = run(source, "-o", tmp_path / "out", "--strict")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"{source}:2" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("absent.jsonl",), "no such file"),
        (("rows.jsonl", "--format", "sharegp"), "sharegpt"),
        (("rows.jsonl", "--languages", "xx"), "no conversation is left"),
        (("rows.jsonl", "--split", "train"), "no split"),
        (("rows.jsonl", "--eval-fraction", "1"), "eval-fraction"),
        (("rows.jsonl", "-o", "full"), "not empty"),
        (("rows.jsonl", "-o", "rows.jsonl"), "is the source itself"),
        (("rows.jsonl", "-o", "rows.jsonl/out"), "is a file, not a folder"),
    ],
)
def test_wrong_input_is_one_message_and_nothing_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(Path("rows.jsonl"), 5, 5)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("keep me")
    before = sorted(tmp_path.rglob("*"))
    done = run(*(arguments if "-o" in arguments else (*arguments, "-o", "out")))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_where_all_records_are_bad_their_reasons_stay_beside_the_output(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    rows = [{"messages": [{"role": role, "content": "Hi"}]} for role in ("pirate", "parrot")]
    rows.append({"messages": [{"role": "user", "content": 7}]})
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = tmp_path / "new" / "out-quarantine.jsonl"
    for _ in range(2):  # a second run replaces what the first one left
        with pytest.raises(UserError) as error:
            prepare(str(source), tmp_path / "new" / "out", PrepareOptions())
        text = str(error.value)
        assert f"2 a turn has a role that the format does not know ({source}:1: unknown role 'pirate' (turn 1)" in text
        assert f"1 a field holds another type than its format says ({source}:3: 'content' must be text" in text
        assert str(kept) in text
        assert [path.name for path in kept.parent.iterdir()] == [kept.name]
        assert [(row["where"], row["row"]) for row in rows_of(kept)] == [
            (f"{source}:{line}", json.dumps(row) + "\n") for line, row in enumerate(rows, start=1)
        ]
    kept.write_text("mine\n")
    with pytest.raises(UserError, match=r"out-quarantine\.new\.jsonl"):
        prepare(str(source), tmp_path / "new" / "out", PrepareOptions())
    assert kept.read_text() == "mine\n"


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("questions", [1, 2, 3])
def test_small_sets_leave_no_side_empty(tmp_path: Path, fraction: float, questions: int) -> None:
    source = write_rows(tmp_path / "rows.jsonl", 6, questions)
    card = prepare(str(source), tmp_path / "out", PrepareOptions(eval_fraction=fraction))
    assert card.train.conversations + card.eval.conversations == 6
    assert card.train.conversations
    assert bool(card.eval.conversations) == (questions > 1)
    assert len(rows_of(tmp_path / "out" / "train.jsonl")) == card.train.conversations
    assert len(rows_of(tmp_path / "out" / "eval.jsonl")) == card.eval.conversations


def test_the_same_seed_writes_the_same_files_and_another_another_split(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", 500, 400)
    written = []
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        prepare(str(source), tmp_path / name, PrepareOptions(seed=seed))
        written.append((tmp_path / name / "eval.jsonl").read_bytes())
    assert written[0] == written[1] != written[2]


def test_a_limit_on_records_is_said_in_the_card(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", 50, 50)
    for limit, stopped in ((10, True), (50, False)):
        card = prepare(str(source), tmp_path / str(limit), PrepareOptions(max_samples=limit))
        assert card.train.conversations + card.eval.conversations == limit
        assert card.stopped_early is stopped
        assert ("max_samples" in card_warning(tmp_path / str(limit))) is stopped


def card_warning(folder: Path) -> str:
    return next((line for line in (folder / "card.md").read_text().splitlines() if "stopped" in line), "")


def test_a_prepared_folder_is_a_source(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", 200, 150)
    card = prepare(str(source), tmp_path / "out", PrepareOptions())
    assert sum(1 for _ in read_conversations(tmp_path / "out")) == card.train.conversations
    assert sum(1 for _ in read_conversations(tmp_path / "out", split="eval")) == card.eval.conversations


@pytest.mark.parametrize("allowed", [1_000, 30_000])
def test_a_full_disk_is_one_message_and_nothing_written(tmp_path: Path, allowed: int) -> None:
    source = write_rows(tmp_path / "rows.jsonl", 2_000, 1_500)
    program = textwrap.dedent(f"""
        import resource, sys
        resource.setrlimit(resource.RLIMIT_FSIZE, ({allowed}, {allowed}))
        sys.argv = ["peftchat", "data", "prepare", {str(source)!r}, "-o", {str(tmp_path / "out")!r}]
        from peftchat.cli.main import main
        main()
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert "cannot write" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_an_interrupted_preparation_leaves_nothing(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", 200, 150)

    def stop(conversations: int) -> None:
        if conversations >= 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(str(source), tmp_path / "out", PrepareOptions(), stop)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_memory_does_not_grow_with_the_source(tmp_path: Path) -> None:
    """Ten times the records, each different, and the peak stays where it was (within the page cache of the set)."""
    words = random.Random(0).sample(range(10**9), 200)

    def peak(rows: int) -> int:
        source = tmp_path / f"{rows}.jsonl"
        with source.open("w") as file:
            for number in range(rows):
                file.write(json.dumps({"prompt": f"{number} {words}", "completion": f"{words}"}) + "\n")
        program = textwrap.dedent(f"""
            import resource
            from pathlib import Path
            from peftchat.conversations.prepare import PrepareOptions, prepare
            prepare({str(source)!r}, Path({str(tmp_path / f"out{rows}")!r}), PrepareOptions())
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        """)
        return int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)

    assert peak(20_000) < peak(2_000) + 12_000


def test_fingerprints_in_memory_and_on_disk_are_one_set(tmp_path: Path) -> None:
    rng = random.Random(1)
    kept: set[bytes] = set()
    with FingerprintSet(tmp_path / "seen", most=50) as seen:
        for _ in range(40):
            batch = [rng.randrange(300).to_bytes(16) for _ in range(rng.randrange(20))]
            new = [index for index, one in enumerate(batch) if one not in kept and one not in batch[:index]]
            assert seen.add(batch) == new
            kept.update(batch)
        assert (tmp_path / "seen").exists()
    assert len(kept) > 100
    assert not (tmp_path / "seen").exists()


def test_region_tags_belong_to_their_language() -> None:
    assert matches_language("pt-BR", ["pt"])
    assert matches_language("pt_br", ["pt-BR"])
    assert not matches_language("pt", ["pt-BR"])
    assert not matches_language("end", ["en"])


def test_the_language_of_records_that_do_not_say_it_is_detected(tmp_path: Path, shared_data: Path) -> None:
    pytest.importorskip("py3langid")
    source = shared_data / "oasst1_guanaco_multilingual_500.jsonl"
    said = [row["lang"].split("-")[0] for row in rows_of(source)]
    found = [detect_language(conversation.messages) for conversation in read_conversations(source)]
    right = sum(a == b for a, b in zip(said, found, strict=True))
    assert right / len(said) > 0.98
    silent = tmp_path / "rows.jsonl"
    silent.write_text(
        "".join(json.dumps({"text": row["text"], "output": row["output"]}) + "\n" for row in rows_of(source))
    )
    card = prepare(str(silent), tmp_path / "out", PrepareOptions(languages=("ru", "uk")))
    kept = card.train.conversations + card.eval.conversations
    assert kept == sum(code in ("ru", "uk") for code in found) - card.skipped.get("duplicate", 0)
    assert card.skipped["other_language"] == 500 - sum(code in ("ru", "uk") for code in found)


def test_without_the_detector_the_cure_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py3langid", None)
    source = write_rows(tmp_path / "rows.jsonl", 5, 5)
    with pytest.raises(UserError, match=r"pip install 'peftchat\[languages\]'"):
        prepare(str(source), tmp_path / "out", PrepareOptions(languages=("en",)))
    assert not (tmp_path / "out").exists()
