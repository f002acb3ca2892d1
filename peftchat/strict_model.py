"""Base class of all sections of settings: strict types, no unknown keys, `null` for the default."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class StrictModel(BaseModel):
    """A frozen section of settings that converts no value and rejects unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, given: Any) -> Any:
        """Remove known keys that hold `null`, so that a recipe can reset what it inherits."""
        if not isinstance(given, Mapping):
            return given
        return {key: value for key, value in given.items() if value is not None or key not in cls.model_fields}


def list_to_tuple(value: object) -> object:
    """Return a list as a tuple, which frozen sections hold; other values fail the type check later."""
    return tuple(value) if isinstance(value, list) else value
