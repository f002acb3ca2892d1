"""Conversations about Python code, generated from its syntax trees."""

from peftchat.from_code.survey import STDLIB, Survey, survey
from peftchat.from_code.writer import CodeConversation, conversations_about, conversations_from_code

__all__ = ["STDLIB", "CodeConversation", "Survey", "conversations_about", "conversations_from_code", "survey"]
