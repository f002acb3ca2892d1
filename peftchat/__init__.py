"""peftchat: fine-tune a base language model into a chat assistant on your own conversations.

The names below are the public API. They are imported when they are first used, so `import peftchat` is immediate.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftchat.api import chat, combine, compare, evaluate, evaluate_data, load_chat_model, merge, plan, train
    from peftchat.conversation import Conversation, Message
    from peftchat.conversations import read_conversations
    from peftchat.errors import UserError, VerificationError
    from peftchat.export.combine import CombineOptions
    from peftchat.merging import MergeOptions
    from peftchat.recipe import LoadedRecipe, Recipe, load_recipe
    from peftchat.runs.run_summary import RunSummary

__version__ = "0.1.0"

_MODULES = {
    "CombineOptions": "peftchat.export.combine",
    "Conversation": "peftchat.conversation",
    "LoadedRecipe": "peftchat.recipe",
    "MergeOptions": "peftchat.merging",
    "Message": "peftchat.conversation",
    "Recipe": "peftchat.recipe",
    "RunSummary": "peftchat.runs.run_summary",
    "UserError": "peftchat.errors",
    "VerificationError": "peftchat.errors",
    "chat": "peftchat.api",
    "combine": "peftchat.api",
    "compare": "peftchat.api",
    "evaluate": "peftchat.api",
    "evaluate_data": "peftchat.api",
    "load_chat_model": "peftchat.api",
    "load_recipe": "peftchat.recipe",
    "merge": "peftchat.api",
    "plan": "peftchat.api",
    "read_conversations": "peftchat.conversations",
    "train": "peftchat.api",
}
"""Public name -> the module that defines it."""

__all__ = [
    "CombineOptions",
    "Conversation",
    "LoadedRecipe",
    "MergeOptions",
    "Message",
    "Recipe",
    "RunSummary",
    "UserError",
    "VerificationError",
    "__version__",
    "chat",
    "combine",
    "compare",
    "evaluate",
    "evaluate_data",
    "load_chat_model",
    "load_recipe",
    "merge",
    "plan",
    "read_conversations",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
