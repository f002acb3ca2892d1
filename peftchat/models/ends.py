"""Where a model's answers end."""

from collections.abc import Iterable


def end_ids(eos_token_id: int | Iterable[int] | None) -> list[int]:
    """The ids that end an answer, from what transformers keeps: none, one or several."""
    if eos_token_id is None:
        return []
    return [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
