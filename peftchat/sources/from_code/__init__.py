"""Dialogues about the user's own Python code, from its syntax trees, signatures and docstrings."""

from peftchat.sources.from_code.dialogues import CodeDialogue, dialogues_about, dialogues_from_code
from peftchat.sources.from_code.stdlib import STDLIB
from peftchat.sources.from_code.survey import Survey, survey

__all__ = ["STDLIB", "CodeDialogue", "Survey", "dialogues_about", "dialogues_from_code", "survey"]
