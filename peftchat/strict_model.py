"""What all groups of settings share: strict types, no unknown keys, and `null` for "the default"."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class StrictModel(BaseModel):
    """A frozen, strict group of keys: nothing is coerced, nothing unknown is let through."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, given: Any) -> Any:
        """Leave out known keys that hold `null`, so that a recipe can undo what it inherits."""
        if not isinstance(given, Mapping):
            return given
        return {key: value for key, value in given.items() if value is not None or key not in cls.model_fields}


def list_to_tuple(value: object) -> object:
    """YAML has lists, frozen sections hold tuples; any other value is left for the type check to judge."""
    return tuple(value) if isinstance(value, list) else value
