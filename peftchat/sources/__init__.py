"""From what people have to `Conversation`: one small file per input form, one reader per kind of file."""

from peftchat.sources.forms import list_formats
from peftchat.sources.mixing import read_entries
from peftchat.sources.options import ReadOptions
from peftchat.sources.problems import Problem, ProblemLog
from peftchat.sources.reading import read_conversations
from peftchat.sources.splitting import EvalSplit, settle_split, split_eval

__all__ = [
    "EvalSplit",
    "Problem",
    "ProblemLog",
    "ReadOptions",
    "list_formats",
    "read_conversations",
    "read_entries",
    "settle_split",
    "split_eval",
]
