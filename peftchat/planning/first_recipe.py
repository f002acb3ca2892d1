"""What a first recipe is made of: a look at the data and at the base model, and which method fits this machine."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from peftchat.conversations.reading import read_sources
from peftchat.models.base_config import carries_state
from peftchat.models.source import MODEL_CONFIG, ModelSource
from peftchat.paths import exists
from peftchat.planning.hardware import Hardware
from peftchat.planning.plan import Prediction, predict
from peftchat.recipe import DataEntry, load_recipe
from peftchat.recipe.document import LOCAL_MARKS
from peftchat.recipe.load import DATA_SUFFIXES
from peftchat.recipe.reference import starting_recipe

if TYPE_CHECKING:
    from peftchat.recipe.sections import Method

CHEAPER: Mapping[str, tuple["Method", ...]] = {"full": ("lora", "qlora"), "lora": ("qlora",), "qlora": ()}
"""Method -> those that need less memory, the nearest first."""

DEMO_MODEL = Path(".cache/smollm2-135m")
_UNPACKED: Mapping[str, str] = {"data.packing": "false"}
_MOST_READ = 5_000
_SUFFIXES = (".json", *DATA_SUFFIXES)


@dataclass(frozen=True)
class DataLook:
    """What was seen of the data.

    Attributes:
        path: where it is.
        conversations: how many conversations were read; None for data on the hub, which is not read.
        is_all: whether these are all of them.
        has_system: whether one has a system message.
    """

    path: str
    conversations: int | None
    is_all: bool
    has_system: bool

    @property
    def text(self) -> str:
        """What was seen, in a few words."""
        if self.conversations is None:
            return "a data set of the hub, which is read when training starts"
        return f"{'' if self.is_all else 'more than '}{self.conversations:,} conversations"


@dataclass(frozen=True)
class ModelLook:
    """What was seen of the base model.

    Attributes:
        name: its folder or hub id.
        kind: its architecture's name.
        has_template: whether its tokenizer writes conversations by a template of its own.
        is_packed: whether its layers keep the conversations of a pack apart.
    """

    name: str
    kind: str
    has_template: bool
    is_packed: bool


@dataclass(frozen=True)
class Choice:
    """What the recipe is to say."""

    method: "Method"
    model: str
    data: str
    template: str
    is_packed: bool = True

    def text(self, target: Path, settings: Mapping[str, str] | None = None) -> str:
        """Return the commented recipe."""
        unpacked = {} if self.is_packed else _UNPACKED
        held = {"chat.template": self.template, **unpacked, **(settings or {})}
        return starting_recipe(self.method, target, model=self.model, data=self.data, settings=held)


def find_data(folder: Path) -> str | None:
    """Return the only file in a folder that can hold conversations; None if there is none, or several."""
    found = [path.name for path in folder.iterdir() if path.name.endswith(_SUFFIXES) and not path.name.startswith(".")]
    return found[0] if len(found) == 1 else None


def find_model(folder: Path) -> str | None:
    """Return the demo's model where `make demo` has left it below a folder, else None."""
    found = folder / DEMO_MODEL
    return str(found) if (found / MODEL_CONFIG).is_file() else None


def look_at_data(path: str) -> DataLook:
    """Read the first conversations.

    Raises:
        UserError: there is no such file, or a record cannot be read.
    """
    if not exists(path) and not path.startswith(LOCAL_MARKS) and path.count("/") == 1 and not Path(path).suffix:
        return DataLook(path, None, False, False)
    count, has_system = 0, False
    for conversation in islice(read_sources([DataEntry(path=path)]), _MOST_READ + 1):
        count += 1
        has_system = has_system or any(message.role == "system" for message in conversation.messages)
    return DataLook(path, min(count, _MOST_READ), count <= _MOST_READ, has_system)


def look_at_model(name: str) -> ModelLook:
    """Read a base model's config and tokenizer.

    Raises:
        UserError: there is no such model, or it cannot be read.
    """
    source = ModelSource.open(name, where=f"the base model {name}")
    source.require_model()
    config = source.config()
    has_template = bool(source.tokenizer().chat_template)
    return ModelLook(name, str(config.model_type), has_template, not carries_state(config))


def settings_for_model(name: str) -> Mapping[str, str]:
    """Return the keys of a recipe that a base model needs, by its config.

    Raises:
        UserError: there is no such model, or its config cannot be read.
    """
    return _UNPACKED if carries_state(ModelSource.open(name).config()) else {}


def predict_choice(
    choice: Choice, hardware: Hardware, target: Path, settings: Mapping[str, str] | None = None
) -> Prediction:
    """Predict what a recipe would need, as `peftchat plan` does.

    Raises:
        UserError: the recipe or the model's config cannot be used.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(choice.text(target, settings), encoding="utf-8")
        loaded = load_recipe(path, to_train=False)
    return predict(loaded.recipe, hardware)
