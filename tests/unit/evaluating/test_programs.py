"""Programs: what passes, what a program cannot do, pass@k against enumeration."""

import gzip
import itertools
import json
import os
from pathlib import Path
from statistics import fmean

import pytest

from peftchat.errors import UserError
from peftchat.evaluating.programs import Problem, pass_at, read_problems
from peftchat.evaluating.run_evaluation import CodeOptions, EvaluateOptions, evaluate_models
from peftchat.evaluating.sandbox import open_doors, run_program, run_programs
from tests.support.chat_models import save_scripted


@pytest.fixture(scope="module")
def _held() -> None:
    doors = open_doors()
    if doors:
        pytest.skip(f"this machine does not hold programs: they {', '.join(doors)}")


def test_pass_at_k_is_the_mean_over_all_draws() -> None:
    for samples, passed, k in [(5, 2, 1), (5, 2, 3), (6, 0, 2), (4, 4, 2), (6, 5, 2)]:
        outcomes = [place < passed for place in range(samples)]
        draws = [any(draw) for draw in itertools.combinations(outcomes, k)]
        assert pass_at(k, samples, passed) == pytest.approx(fmean(draws))


@pytest.mark.parametrize(
    "source",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        'import os, sys\nos.write(int(sys.argv[1]), b\'{"passed": true, "error": null}\')\nos._exit(0)',
        "assert 1 == 2",
        "while True: pass",
        "import os\nwhile True: os.fork()",
        "file = open('x', 'w')\nwhile True: file.write('x' * 100_000)",
        "x = [0] * 10**10",
        "def f(): f()\nf()",
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,)).start()",
        "import subprocess; subprocess.run(['/bin/true'])",
        "raise KeyboardInterrupt",
        "import ctypes; ctypes.string_at(0)",
        "import atexit, os\natexit.register(os._exit, 0)\nassert False",
    ],
)
@pytest.mark.usefixtures("_held")
def test_a_program_passes_only_at_its_end(source: str) -> None:
    assert not run_program(source, cpu_seconds=1).passed


@pytest.mark.usefixtures("_held")
def test_a_program_sees_nothing_of_its_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "secret")
    (tmp_path / "key").write_text("secret")
    for source in (
        f"print(open({str(tmp_path / 'key')!r}).read())",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"import os; os.remove({str(tmp_path / 'key')!r})",
        f"import os; os.listdir({str(tmp_path)!r})",
        f"open('/proc/{os.getpid()}/environ', 'rb').read()",
        f"import os; os.kill({os.getpid()}, 0)",
        "import socket; socket.socket()",
        "import os; assert 'secret' not in os.environ.values(); os.environ['API_KEY']",
    ):
        end = run_program(source)
        assert not end.passed
        assert "Permission" in str(end.error) or "KeyError" in str(end.error)
    assert (tmp_path / "key").read_text() == "secret"


@pytest.mark.usefixtures("_held")
def test_ordinary_programs_pass() -> None:
    sources = ["import math, re, typing, collections", "open('x', 'w').write('y'); assert open('x').read() == 'y'",
               "import threading\nt = threading.Thread(target=print); t.start(); t.join()"]  # fmt: skip
    assert all(end.passed for end in run_programs(sources))


@pytest.mark.usefixtures("_held")
def test_the_solutions_of_humaneval_pass_and_others_fail(shared_data: Path) -> None:
    problems = read_problems(shared_data / "eval/HumanEval.jsonl.gz")[::20]
    right = [problem.program(str(problem.solution), from_chat=False) for problem in problems]
    whole = [f"Here:\n```python\n{problem.prompt}{problem.solution}\n```\nDone." for problem in problems]
    chat = [problem.program(answer, from_chat=True) for problem, answer in zip(problems, whole, strict=True)]
    wrong = [problem.program("    return None\n", from_chat=False) for problem in problems]
    left = [problem.program("    import sys; sys.exit(0)\n", from_chat=False) for problem in problems]
    ends = [end.passed for end in run_programs([*right, *chat, *wrong, *left])]
    count = len(problems)
    assert all(ends[: 2 * count])
    assert not any(ends[2 * count :])


def test_both_forms_of_mbpp() -> None:
    whole = {"task_id": 2, "text": "Add one.", "code": "def f(x):\n    return x + 1",
             "test_list": ["assert f(1) == 2"], "test_setup_code": ""}  # fmt: skip
    sanitized = {"task_id": 2, "prompt": "Add one.", "code": whole["code"], "test_list": whole["test_list"],
                 "test_imports": ["import math"]}  # fmt: skip
    for record in (whole, sanitized):
        problem = Problem.of(record)
        assert problem.prompt == '"""\nAdd one.\nassert f(1) == 2\n"""\n'
        assert run_program(problem.program(f"{problem.solution}\n", from_chat=False)).passed
        assert not run_program(problem.program("def f(x):\n    return x\n", from_chat=False)).passed
        assert run_program(problem.program(f"```\n{problem.solution}\n```", from_chat=True)).passed


@pytest.mark.usefixtures("_held")
def test_a_model_writes_and_its_programs_are_counted(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra `evaluate`")
    model = save_scripted(tmp_path / "model", " x=1")
    lines = [
        {
            "task_id": name,
            "prompt": "def f():\n",
            "entry_point": "f",
            "test": f"def check(f):\n    assert f() is {value}",
        }
        for name, value in (("a", "None"), ("b", "True"))
    ]
    with gzip.open(tmp_path / "own.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    code = CodeOptions([tmp_path / "own.jsonl.gz"], run=True)
    found, folder = evaluate_models(str(model), EvaluateOptions(code=code, output=tmp_path / "out"))
    (row,) = found.tasks
    assert (row.task, row.metrics[0].metric, row.metrics[0].values) == ("own", "pass@1", (0.5,))
    samples = [json.loads(line) for line in (folder / "samples-1.jsonl").read_text().splitlines()]
    assert [sample["passed"] for sample in samples] == [1, 0]
    assert samples[1]["errors"] == ["AssertionError: "]
    with pytest.raises(UserError, match="Add `--run-code`"):
        evaluate_models(str(model), EvaluateOptions(code=CodeOptions(code.files), output=tmp_path / "other"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the file has no problems"),
        ('{"task_id": 1}', "has no 'prompt'"),
        ("no JSON", "own.jsonl:1: the record cannot be read"),
        ('{"task_id": 1, "text": "x", "test_list": ["assert 1"]}\n' * 2, "is there twice"),
    ],
)
def test_a_file_without_problems_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text(text)
    with pytest.raises(UserError, match=said):
        read_problems(tmp_path / "own.jsonl")
