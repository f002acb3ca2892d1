"""The names that files use: one list of roles and of fields for all formats.

Where a record has several names of one thing, the first of the list counts, and the others must agree with it.
"""

import re

from peftchat.conversation import Role

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool_calls": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_result": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "tool_results": "tool",
    "ipython": "tool",
}
"""Name of a role, in lower case and with `_` -> role. Any case is known, and `-` or a blank for `_`."""

CALL_ROLES = frozenset({"function_call", "tool_call", "tool_calls"})
"""Roles of turns whose content is a call as JSON."""

_DIALOGUE = "dialogue"  # codespell:ignore
TURNS = ("messages", "conversations", "conversation", "dialog", _DIALOGUE, "dialogs", "turns", "chat", "chat_messages")
ROLE = ("role", "from", "speaker", "author", "sender")
CONTENT = ("content", "value", "text", "message")
REASONING = ("reasoning_content", "reasoning", "thinking")
SYSTEM = ("system", "system_prompt", "system_message", "systemPrompt", "systemInstruction", "system_instruction")
TOOLS = ("tools", "functions")
HISTORY = "history"
CONTEXT = ("input", "context")
"""Text that a question is about, in a field of its own."""

TRAIN_FLAGS = ("train", "training", "trainable", "loss")
"""true or false, 1 or 0: whether a turn or a record is trained."""
TRAIN_WEIGHTS = ("weight", "loss_weight", "loss_scale")
"""1 or 0: the same as a number."""
TURN_MASKS = ("loss_mask", "train_mask", "weights", "loss_weights")
"""Fields of a record: a flag for each turn, or for each answer."""
LOOKS_LIKE_FLAG = re.compile(r"train|loss|weight|mask|ignore|supervis|skip|learn|label|target", re.IGNORECASE)
"""Fields of a turn that may decide what is trained. One that nobody knows is refused."""
LOOKS_LIKE_MASK = re.compile(
    r"mask|train_(on|ind|turn)|trainable|weights$|(last|final).*only|only.*(last|final)", re.IGNORECASE
)
"""The same for lists and flags of a record."""

MEDIA = frozenset({"image", "images", "video", "videos", "audio", "audios", "image_url", "files", "pixel_values"})
CHOSEN, REJECTED, LABEL = "chosen", "rejected", "label"
PREFERRED = {
    "preferred_output": "non_preferred_output",
    "chosen_response": "rejected_response",
    "response_j": "response_k",
}
"""Other names of the chosen answer, each with that of the rejected one: in OpenAI's files, whose prompt is below
`input`, in Argilla's first form of UltraFeedback, and in pairs of Stack Exchange."""
REJECTED_BESIDE_TURNS = ("rejected_messages", "rejected_response")
"""The rejected answer beside turns that end with the chosen one, as ms-swift has it: whole turns, or the answer."""
HELD_OUT_SPLITS = frozenset({"test", "validation", "valid", "val", "dev", "eval", "evaluation", "held_out", "heldout"})
"""Values of a field `split` of records that their author did not mean to be trained on."""

METADATA = frozenset(
    {
        *("id", "idx", "index", "uuid", "uid", "key", "hash", "sha", "number", "row", "turn", "position"),
        *("lang", "language", "languages", "locale", "country", "state", "region"),
        *("source", "sources", "origin", "dataset", "data_source", "datasource", "subset", "split", "config", "file"),
        *("category", "categories", "type", "kind", "task", "task_type", "topic", "topics", "tag", "tags", "domain"),
        *("subject", "skill", "skills", "difficulty", "level", "quality", "score", "scores", "rating", "ratings"),
        *("model", "model_name", "models", "generator", "engine", "provider", "temperature", "seed", "version"),
        *("created", "created_at", "create_time", "updated_at", "update_time", "timestamp", "time", "date", "year"),
        *("license", "url", "link", "path", "repo", "commit", "user_id", "username", "annotator", "meta", "metadata"),
        *("title", "tokens", "num_tokens", "token_count", "length", "num_turns", "turns_count", "redacted", "toxic"),
        *("openai_moderation", "moderation", "conversation_hash", "parallel_tool_calls", "message_tree_id", "object"),
        *("custom_id", "request_parameters", "response_metadata", "tree_state"),
    }
)
"""Fields that describe a record and that nobody expects to be trained on: kept as columns, and not told."""

ASKED = ("instruction", "prompt", "question", "query", "problem", "user", "human", "inputs", "input")
ANSWERED = (
    *("completion", "response", "output", "generated_solution", "solution", "answer"),
    *("assistant", "targets", "target"),
)
"""Names of the two sides of a pair, in the order in which they count.

Sets of mathematics have the way to the result as `solution`, and the bare result as `answer`.
"""
OPTIONS = ("options", "choices", "endings")
"""The options of a question, of which an answer such as `B` names one."""
VERDICT, VERDICTS = "answer", frozenset({"accept", "reject", "ignore"})
VERDICT_MARK = "_task_hash"
"""What an annotator of Prodigy said of a record: a field that other files have for an answer."""


def normalize_role(name: str) -> str:
    """Return a role's name as `ROLES` has it."""
    return name.strip().removesuffix(":").lower().replace("-", "_").replace(" ", "_")
