"""Problems that are solved by a program: HumanEval's and MBPP's files, the program of an answer, pass@k."""

import gzip
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from peftchat.errors import UserError, first_line

STOPS = ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\nassert", "\n```")
"""Where a completion ends: at the next statement that is not indented (Chen et al., 2021, and BigCode's harness)."""

_FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem with its tests.

    Attributes:
        name: as the file names it.
        prompt: what a base model completes.
        is_code: whether the prompt is the beginning of the program, as HumanEval's is; MBPP's is a text.
        tests: Python that raises if the program is wrong.
        entry_point: the function that is asked for; None where the tests alone tell.
        solution: the file's own solution, for checks.
    """

    name: str
    prompt: str
    is_code: bool
    tests: str
    entry_point: str | None
    solution: str | None

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        """Read a record of HumanEval or MBPP.

        Raises:
            KeyError: it is neither; the message is the missing field.
        """
        if "entry_point" in fields:
            tests = f"{fields['test']}\ncheck({fields['entry_point']})\n"
            name, solution = str(fields["task_id"]), fields.get("canonical_solution")
            # White space at the end would split the first token of the completion.
            return cls(name, fields["prompt"].rstrip() + "\n", True, tests, fields["entry_point"], solution)
        # The sanitized file has `prompt` and `test_imports`, the whole one `text` and `test_setup_code`.
        text = fields.get("text") or fields["prompt"]
        checks = [str(check) for check in fields["test_list"]]
        setup = fields.get("test_imports") or fields.get("test_setup_code") or ""
        tests = "\n".join([setup if isinstance(setup, str) else "\n".join(setup), *checks]) + "\n"
        # The prompt of BigCode's harness, without shots: one test shows the name of the function.
        prompt = f'"""\n{text}\n{checks[0]}\n"""\n'
        return cls(str(fields["task_id"]), prompt, False, tests, None, fields.get("code"))

    @property
    def question(self) -> str:
        """What a chat model is asked."""
        if self.is_code:
            return f"Complete this Python function. Answer with the whole function.\n\n```python\n{self.prompt}```"
        return f"Write this in Python. Answer with code only.\n\n{self.prompt}"

    def program(self, answer: str, *, from_chat: bool) -> str:
        """Return the program to run: the answer with what belongs before it, and the tests.

        Args:
            answer: a completion of the prompt, or a chat model's answer.
            from_chat: whether the answer is to the question and not to the prompt.
        """
        code = answer
        if from_chat:
            found = _FENCED.search(answer)
            code = found[1] if found else answer
            is_whole = self.entry_point is None or re.search(rf"^def {re.escape(self.entry_point)}\b", code, re.M)
            if is_whole:
                # What the prompt imports stands above the function that the answer repeats.
                head = self.prompt[: self.prompt.find("def ")] if self.is_code else ""
                return f"{head}\n{code}\n\n{self.tests}"
        return f"{self.prompt}{code}\n\n{self.tests}"


def read_problems(path: Path) -> list[Problem]:
    """Read a file of HumanEval or MBPP: JSON lines, gzipped or not.

    Raises:
        UserError: it cannot be read, or a record is neither's.
    """
    where = f"--code {path}"
    try:
        data = path.read_bytes()
        lines = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8").splitlines()
    except FileNotFoundError as error:
        raise UserError("there is no such file", where=where, hint="Name a file such as HumanEval.jsonl.gz.") from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"the file cannot be read: {first_line(error)}", where=where) from error
    problems: dict[str, Problem] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            problem = Problem.of(json.loads(line))
        except KeyError as error:
            what = f"the record has no {error.args[0]!r}, so it is neither HumanEval's nor MBPP's"
            raise UserError(what, where=place) from error
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            raise UserError(f"the record cannot be read: {first_line(error)}", where=place) from error
        if problem.name in problems:
            raise UserError(f"{problem.name} is there twice", where=place)
        problems[problem.name] = problem
    if not problems:
        raise UserError("the file has no problems", where=where)
    return list(problems.values())


def pass_at(k: int, samples: int, passed: int) -> float:
    """Return the chance that at least one of `k` programs passes, without bias (Chen et al., 2021, equation 1).

    Args:
        k: programs that are drawn.
        samples: programs of the problem, at least `k`.
        passed: how many of them pass.
    """
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)
