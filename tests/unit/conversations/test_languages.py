"""Languages as data sets write them: names, codes of two and three letters, regions; and values that are none."""

import json
from pathlib import Path

import pytest

from peftchat.conversations import ProblemLog, ReadOptions, read_conversations
from peftchat.conversations.language_names import language_tag
from peftchat.errors import UserError

FRENCH = "Bonjour, pourriez-vous m'expliquer comment on prépare une tarte aux pommes chez ma grand-mère ?"


@pytest.mark.parametrize(
    ("value", "tag"),
    [
        ("French", "fr"),
        (" FRENCH ", "fr"),
        ("fra", "fr"),
        ("fre", "fr"),
        ("fr_CA", "fr-ca"),
        ("fra_Latn", "fr-latn"),
        ("Canadian French", "fr"),
        ("Chinese (Traditional)", "zh"),
        ("cmn-Hant", "zh-hant"),
        ("Norwegian", "no"),
        ("Deutsch", "de"),
        ("python", None),
        ("Python 3", None),
        ("C++", None),
        ("html", None),
        ("sh", None),
        ("und", None),
        ("unknown", None),
        ("n/a", None),
        ("non English", None),
        ("multilingual", None),
        ("", None),
    ],
)
def test_a_language_by_name_or_code(value: str, tag: str | None) -> None:
    assert language_tag(value) == tag


def test_a_value_that_is_no_language_leaves_the_choice_to_the_text_and_is_counted(tmp_path: Path) -> None:
    fields = [{"language": "French"}, {"lang": "fra"}, {"language": "rust"}, {"lang": "?", "language": "fr"}, {}]
    fields += [{"language": "Dutch"}, {"language": "rust"}]
    rows = [{**extra, "prompt": f"{number} {FRENCH}", "completion": FRENCH} for number, extra in enumerate(fields)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    log = ProblemLog()
    options = ReadOptions(languages=("French",))
    found = [
        one.messages[0].content[0] for one in read_conversations(tmp_path / "a.jsonl", problems=log, options=options)
    ]
    assert found == ["0", "1", "2", "3", "4", "6"]
    assert log.skipped["other_language"] == 1
    assert log.remarks == {
        "`language: rust` is not a language, and the text decided": 2,
        "`lang: ?` is not a language, and the text decided": 1,
    }


def test_a_wanted_language_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(UserError, match="'Frenhc' is not a language"):
        read_conversations(tmp_path / "a.jsonl", options=ReadOptions(languages=("en", "Frenhc")))
