"""From what people have to `Conversation`: one small file per input format, one reader per kind of file."""

from peftchat.conversations.formats import list_formats
from peftchat.conversations.problems import Problem, ProblemLog, ReadOptions
from peftchat.conversations.reading import read_conversations, read_sources
from peftchat.conversations.splitting import EvalSplit, fit_split

__all__ = [
    "EvalSplit",
    "Problem",
    "ProblemLog",
    "ReadOptions",
    "list_formats",
    "read_conversations",
    "read_sources",
    "fit_split",
]
