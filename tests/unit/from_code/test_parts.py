"""Parts of the conversations about code: English from docstrings, parameters, secrets and signatures."""

import ast

import pytest

from peftchat.from_code.behavior import ResultKind, behavior, raised_exceptions, result_kind
from peftchat.from_code.calls import describe_parameters, signature
from peftchat.from_code.docstrings import read_docstring
from peftchat.from_code.english import article, following_sentence, infinitive_phrase, sentence_about, sentences
from peftchat.from_code.inventory import CodeObject, code_objects, top_level
from peftchat.from_code.survey import has_secret


def only_object(source: str) -> CodeObject:
    ((_, node),) = top_level(ast.parse(source)).items()
    return next(code_objects(node, source, "m", private=True))


@pytest.mark.parametrize(
    ("kind", "sentence", "expected"),
    [
        ("function", "Copy data and metadata.", "X copies data and metadata."),
        (
            "function",
            "Split it on spaces, sort the words and return them.",
            "X splits it on spaces, sorts the words and returns them.",
        ),
        ("function", "Update or create a card.", "X updates or creates a card."),
        ("function", "Open a file to read and write it.", "X opens a file to read and write it."),
        ("function", "Recursively delete a tree.", "X recursively deletes a tree."),
        ("function", "Returns the sum.", "X returns the sum."),
        ("function", "True if it is empty.", "X returns `True` if it is empty."),
        ("property", "True if it is empty.", "X is `True` if it is empty."),
        ("method", "Whether it is empty.", "X tells whether it is empty."),
        ("method", "Like copy but faster.", "X works like copy but faster."),
        ("class", "An ordered mapping.", "X is an ordered mapping."),
        ("class", "Dict subclass for counting items.", "X is a dict subclass for counting items."),
        ("class", "HTTP server that answers.", "X is an HTTP server that answers."),
        ("class", "This class represents a mount point.", "X represents a mount point."),
        ("function", "Decorator that caches results.", "X is a decorator that caches results."),
        ("module", "Utilities for with-statement contexts.", "X offers utilities for with-statement contexts."),
        ("class", "Various conditions to check for.", None),
        ("function", "Set of all names.", None),
        ("method", "Override this in a subclass.", None),
        ("function", "Return value is a string.", None),
    ],
)
def test_a_docstring_sentence_gets_its_subject(kind: str, sentence: str, expected: str | None) -> None:
    assert sentence_about("X", sentence, kind=kind) == expected


def test_later_sentences_and_tasks() -> None:
    assert following_sentence("Return the path.") == "It returns the path."
    assert following_sentence("If it is missing, raise an error.") == "If it is missing, it raises an error."
    assert following_sentence("The path may be relative") == "The path may be relative."
    assert infinitive_phrase("Copy data.") == "copy data"
    assert infinitive_phrase("The data is copied.") is None
    assert sentences("It works, e.g. Here. Then `it` ends. Done") == ["It works, e.g. Here.", "Then `it` ends.", "Done"]
    assert [article(word) for word in ("user", "hour", "XML file", "UUID", "error")] == ["a", "an", "an", "a", "an"]


@pytest.mark.parametrize(
    "text",
    [
        "Do it.\n\nArgs:\n    path (str): Where it lies,\n        on disk.\n    mode: How.\n\nReturns:\n    int: no",
        "Do it.\n\nParameters\n----------\npath : str\n    Where it lies,\n    on disk.\nmode\n    How.\n\n"
        "Returns\n-------\nint\n    Nothing.",
        "Do it.\n\n:param str path: Where it lies,\n    on disk.\n:param mode: How.\n:returns: nothing",
    ],
    ids=["google", "numpy", "sphinx"],
)
def test_documented_parameters(text: str) -> None:
    doc = read_docstring(text)
    assert doc.parameters == {"path": "Where it lies, on disk.", "mode": "How."}
    assert doc.prose == ("Do it.",)


@pytest.mark.parametrize(
    ("text", "prose"),
    [
        ("copy(src) -> dst\n\nCopy a file with :func:`~shutil.move`.", ("Copy a file with `shutil.move`.",)),
        ("Copy ``src``.  See move() for more.", ("Copy `src`.",)),
        ("Copy it, then call close().", ("Copy it, then call `close()`.",)),
        ("- a list\n- of things", ()),
        ("Check two things. These are:\n1. This.\n2. That.", ("Check two things.",)),
        (">>> 1 + 1\n2", ()),
        ("Copy it as follows:\n\n    copy(a)", ()),
        (None, ()),
    ],
)
def test_prose_without_markup(text: str | None, prose: tuple[str, ...]) -> None:
    assert read_docstring(text).prose == prose


@pytest.mark.parametrize(
    "text",
    [
        'password = "hunter22!"',
        "API_KEY: str = 'abc123def456'",
        '{"token": "tok_123456"}',
        'key = "AKIAIOSFODNN7EXAMPLE"',
        "-----BEGIN RSA PRIVATE KEY-----",
        'url = "postgres://bob:s3cret@host/db"',
        'digest = "d41d8cd98f00b204e9800998ecf8427e"',
        'key = "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY0"',
    ],
)
def test_secrets_are_seen(text: str) -> None:
    assert has_secret(text)


@pytest.mark.parametrize(
    "text",
    [
        "def get(password=None, token=''): ...",
        "password = getpass.getpass('Password: ')",
        'raise ValueError("token expected")',
        'letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"',
        'url = "https://example.org/a:b@c"',
        'name = "a_rather_long_identifier_that_is_no_key"',
    ],
)
def test_ordinary_code_is_no_secret(text: str) -> None:
    assert not has_secret(text)


def test_signature_is_written_as_in_the_source() -> None:
    for line in ("f(a, /, b: int = 2, *c, d, e=3, **g)", "f(*, a)", "f()", "f(a, b, /)"):
        assert signature(only_object(f"def {line}: pass")) == line


def test_parameters_in_words() -> None:
    description = describe_parameters(only_object("def f(a, b=1, *, c, d=None, _e=0, **g): pass"))
    assert description == (
        "It takes `a` and `c` (`c` by name only). Optional are `b` (default `1`) and `d` (default `None`). "
        "It also accepts any keyword arguments (`**g`)."
    )
    assert describe_parameters(only_object("def f(a=_MISSING): pass")) == "`a` is optional."


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("def f(): return 1", ResultKind.VALUE),
        ("def f(): return None", ResultKind.NOTHING),
        ("def f():\n    def g(): yield 1", ResultKind.NOTHING),
        ("def f(): yield 1", ResultKind.GENERATOR),
        ("async def f(): return 1", ResultKind.COROUTINE),
        ("async def f(): yield 1", ResultKind.ASYNC_GENERATOR),
        ("@contextlib.contextmanager\ndef f(): yield", ResultKind.CONTEXT_MANAGER),
    ],
)
def test_how_a_call_returns_its_result(source: str, kind: ResultKind) -> None:
    assert result_kind(ast.parse(source).body[0]) is kind


def test_a_condition_is_named_only_where_it_alone_decides() -> None:
    source = """
def f(a, b):
    if a:
        raise TypeError("no a")
    if b:
        return 1
    if a > b:
        raise ValueError("late")
    for x in b:
        if x:
            raise KeyError(x)
    raise error
"""
    found = raised_exceptions(ast.parse(source).body[0])
    assert [(item.name, item.condition, item.message) for item in found] == [
        ("TypeError", "a", "no a"),
        ("ValueError", None, "late"),
        ("KeyError", None, None),
    ]
    assert "It loops over `b`, calling each element `x`." in behavior(ast.parse(source).body[0])
