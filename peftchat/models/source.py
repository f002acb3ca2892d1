"""A model that a user names: a folder or a hub id, opened in the same way by every command."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftchat.addresses import advice_on_page
from peftchat.console import stderr
from peftchat.errors import UserError, first_line
from peftchat.recipe import LoadedRecipe, Recipe, load_recipe
from peftchat.runs.run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

ADAPTER_CONFIG = "adapter_config.json"
MODEL_CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
GENERATION_CONFIG = "generation_config.json"

LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError)
"""What transformers, PEFT and huggingface_hub raise for a name, a file or a config that they cannot use."""

MISFIT_ERRORS = (ValueError, KeyError, TypeError, RuntimeError, IndexError)
"""What PEFT raises where an adapter's tensors do not fit a model."""

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"

_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
"""The files of a tokenizer that may be large enough for git-lfs, and the one that names its class."""

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
"""Files of which every tokenizer has one."""

_OUTPUT = {"return_dict": True, "output_hidden_states": False, "output_attentions": False}
"""What a forward returns, whatever `config.json` says.

The states of all layers would stay in memory, a tuple has no names, and some such configs cannot be saved.
"""

_DOWNLOADED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py"]


_OTHER_MODELS = (
    ("*.gguf", "the folder holds a GGUF file", "Name the safetensors model that it was converted from."),
    ("model_index.json", "the folder holds a diffusers pipeline", "Name a language model."),
    ("modules.json", "the folder holds a sentence-transformers model", "Name a language model with a head."),
    ("consolidated*", "the folder holds weights in their authors' format", "Download the model for transformers."),
    ("model*.safetensors", "the folder holds weights", f"Copy or download its {MODEL_CONFIG} too."),
    ("pytorch_model*.bin", "the folder holds pickled weights", "Name a model that is saved as safetensors."),
    ("checkpoint-*", "the folder holds checkpoints", "Name one of them."),
)
"""Files by which a folder without a config is recognized: a pattern, what it is, and what to do."""


class ModelKind(Enum):
    """What a name stands for. The folder of a run or of a merged model is of the kind of the files it holds."""

    HUB = "hub model"
    FULL = "full model"
    ADAPTER = "adapter"
    UNFINISHED = "unfinished run"
    EMPTY = "folder without a model"


@dataclass(frozen=True)
class ModelSource:
    """A named model. Files are read when a method asks for them.

    Files that an adapter's folder lacks come from its base.

    Attributes:
        name: the folder or the hub id.
        kind: what the name stands for.
        where: how error messages refer to the model.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: whether the model's own code may run; None follows the run's recipe, if there is one.
        base_name: folder or hub id of an adapter's base; None for the one that it was trained on.
    """

    name: str
    kind: ModelKind
    where: str
    revision: str | None = None
    trust_remote_code: bool | None = None
    base_name: str | None = None

    @classmethod
    def open(
        cls,
        name: str,
        *,
        revision: str | None = None,
        trust_remote_code: bool | None = None,
        where: str | None = None,
        local: bool = False,
        base: str | None = None,
    ) -> "ModelSource":
        """Find out what a name stands for.

        Args:
            name: a folder or a hub id.
            revision: branch, tag or commit of a hub model.
            trust_remote_code: whether the model's own code may run; None follows the run's recipe.
            where: how error messages refer to the model; None for its name.
            local: the name must be that of a folder.
            base: folder or hub id of an adapter's base; None for the one that it was trained on.

        Raises:
            UserError: the name is a path and leads to no folder.
        """
        source = cls(name, _kind_of(Path(name)), where or name, revision, trust_remote_code, base)
        is_path = local or name.startswith((".", "/", "~")) or name.count("/") > 1
        if source.kind is ModelKind.HUB and is_path:
            raise source._error("there is no such folder", advice_on_page(name) or "Check the path.")
        if source.kind is not ModelKind.HUB and not source.path.is_dir():
            raise source._error("expected a model folder, got a file")
        return source

    @classmethod
    def of_recipe(cls, recipe: Recipe) -> "ModelSource":
        """Open the base model of a recipe.

        Raises:
            UserError: there is no such folder, or it holds an adapter.
        """
        model = recipe.model
        source = cls.open(
            model.name,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            where=f"model.name: {model.name}",
        )
        if source.kind is ModelKind.ADAPTER:
            hint = "Name the adapter's base here, or merge it first with `peftchat merge`."
            raise source._error("expected a full model, got an adapter", hint)
        return source

    @property
    def path(self) -> Path:
        """The folder of a model that is not on the hub."""
        return Path(self.name)

    @property
    def absolute_name(self) -> str:
        """The name that stands for the same model from every folder, for files that outlive a command."""
        return self.name if self.kind is ModelKind.HUB else str(self.path.absolute())

    def has(self, file: str) -> bool:
        """Return whether the folder holds a file; False for a hub model."""
        return self.kind is not ModelKind.HUB and (self.path / file).is_file()

    def recipe(self) -> LoadedRecipe | None:
        """Read the recipe of a run folder; None where there is none.

        Raises:
            UserError: the recipe cannot be used.
        """
        run = RunFolder(self.path)
        return load_recipe(run.recipe, to_train=False, upgrade=True) if run.is_run else None

    def base(self) -> "ModelSource":
        """Open the base of an adapter: `base_name`, else that of the run's recipe, else that of the adapter's config.

        Raises:
            UserError: neither names a base, or there is no such folder.
        """
        recipe = self.recipe()
        if recipe is not None:
            model = recipe.recipe.model
            if self.base_name is not None:
                return _open_base(self.base_name, None, model.trust_remote_code)
            return _open_base(model.name, model.revision, model.trust_remote_code)
        if self.base_name is not None:
            return _open_base(self.base_name, None, bool(self.trust_remote_code))
        config = read_json(self.path / ADAPTER_CONFIG)
        name = config.get("base_model_name_or_path")
        if not name:
            raise UserError(
                "the adapter does not name its base",
                where=str(self.path / ADAPTER_CONFIG),
                hint="Set base_model_name_or_path there.",
            )
        return _open_base(str(name), config.get("revision"), bool(self.trust_remote_code))

    def require_model(self) -> None:
        """Check that there is a model or an adapter under the name.

        Raises:
            UserError: the folder holds neither.
        """
        if self.kind is ModelKind.UNFINISHED:
            hint = "Finish it with `peftchat train RECIPE --resume`."
            raise self._error("the run has not finished, so its folder holds no model yet", hint)
        if self.kind is ModelKind.EMPTY:
            raise self._empty_folder()

    def _empty_folder(self) -> UserError:
        """Say what a folder holds that is neither a model of transformers nor an adapter."""
        for pattern, what, hint in _OTHER_MODELS:
            found = next(iter(sorted(self.path.glob(pattern))), None)
            if found is not None:
                return self._error(f"{what} ({found.name}), without {MODEL_CONFIG}", hint)
        hint = "Name a run folder, a model folder or a hub id."
        return self._error(f"the folder has no {MODEL_CONFIG} or {ADAPTER_CONFIG}", hint)

    def has_weights(self) -> bool:
        """Return whether the folder holds safetensors weights; False for a hub model."""
        return self.has(WEIGHTS) or self.has(WEIGHTS_INDEX)

    def weights_folder(self, *, download: bool = False) -> Path | None:
        """Return the folder with the model's safetensors files; None for a hub model whose files are not here.

        Args:
            download: whether to download those of a hub model; an error is left to the loading of the model.
        """
        if self.kind is not ModelKind.HUB:
            return self.path
        index = self._hub_file(WEIGHTS, download=download) or self._hub_file(WEIGHTS_INDEX, download=download)
        if index is None or index.name == WEIGHTS:
            return index and index.parent
        shards = set(read_index(index).values())
        complete = all(self._hub_file(shard, download=download) is not None for shard in sorted(shards))
        return index.parent if complete else None

    def _hub_file(self, file: str, *, download: bool) -> Path | None:
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(self.name, file, revision=self.revision, local_files_only=not download))
        except LOAD_ERRORS:
            return None

    def check_weights(self) -> None:
        """Check the weight files of a local full model; a hub model is not checked.

        Raises:
            UserError: the folder has no config, no weights, incomplete weights or pickled weights only.
        """
        self.require_model()
        if self.kind is ModelKind.HUB or self.has(WEIGHTS):
            return
        if self.has(WEIGHTS_INDEX):
            files = sorted(set(read_index(self.path / WEIGHTS_INDEX).values()))
            missing = [file for file in files if not self.has(file)]
            if missing:
                what = f"{len(missing)} of {len(files)} weight files are missing, the first is {missing[0]}"
                raise self._error(what, "Download the model again.")
            return
        pickled = next(iter(sorted(self.path.glob("pytorch_model*.bin"))), None)
        if pickled is not None:
            hint = "Save them as safetensors first: `AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)`."
            raise self._error(f"the weights are pickled ({pickled.name}); loading them could run any code", hint)
        raise self._error(
            f"the folder has no safetensors weights ({WEIGHTS} or its index)", "Download the complete model."
        )

    def check_folder(self) -> None:
        """Check what can be checked of a local full model by its files, without transformers.

        Raises:
            UserError: the folder has no model, a config that cannot be read, or weights that cannot be loaded.
        """
        self.require_model()
        if self.kind is ModelKind.FULL:
            read_json(self.path / MODEL_CONFIG)
            self.check_weights()

    def config(self) -> "PretrainedConfig":
        """Load the model's config; that of an adapter is its base's.

        Raises:
            UserError: it cannot be loaded.
        """
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig

        self.require_model()
        if self.kind is ModelKind.ADAPTER:
            return self.base().config()
        self._refuse_lfs_pointers((MODEL_CONFIG,))
        try:
            return AutoConfig.from_pretrained(self.name, **_OUTPUT, **self._hub_arguments())
        except StrictDataclassError as error:
            # Its first line names the validator; the reason is in its cause.
            cause = error.__cause__
            raise self._load_error("the model's config", cause if isinstance(cause, Exception) else error) from error
        except LOAD_ERRORS as error:
            raise self._load_error("the model's config", error) from error

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Load the tokenizer. Weights need not be there.

        Raises:
            UserError: it cannot be loaded.
        """
        from transformers import AutoTokenizer

        if self.kind is ModelKind.ADAPTER and not self.has("tokenizer_config.json"):
            return self.base().tokenizer()
        self._refuse_lfs_pointers(_TOKENIZER_FILES)
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.name, **self._hub_arguments())
        except LOAD_ERRORS as error:
            if self.kind is not ModelKind.HUB and not any(map(self.has, _VOCABULARIES)):
                hint = f"Copy or download its {_VOCABULARIES[0]} too."
                raise self._error("the folder has no tokenizer", hint) from error
            raise self._load_error("the tokenizer", error) from error
        self._take_default_template(tokenizer)
        return tokenizer

    def _take_default_template(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Keep one chat template of a tokenizer that has several by name, and tell it.

        transformers chooses among them for each conversation, by its tools; a run is saved with one.
        """
        templates = tokenizer.chat_template
        if not isinstance(templates, dict):
            return
        tokenizer.chat_template = templates.get("default")
        others = ", ".join(f"`{name}`" for name in templates if name != "default")
        used = "`default` is used" if tokenizer.chat_template else "none of them is `default`, so none is used"
        if others:
            stderr.print(
                f"Note: {self.name} has several chat templates; {used}, and not {others}. `chat.template` can name the "
                "file of another.",
                markup=False,
                highlight=False,
            )

    def generation_config(self) -> "GenerationConfig":
        """Load the generation settings; a model without a file of them has those that its config implies.

        Raises:
            UserError: they cannot be loaded.
        """
        from transformers import GenerationConfig

        is_hub = self.kind is ModelKind.HUB
        if is_hub or self.has(GENERATION_CONFIG):
            self._refuse_lfs_pointers((GENERATION_CONFIG,))
            try:
                return GenerationConfig.from_pretrained(self.name, revision=self.revision or "main")
            except LOAD_ERRORS as error:
                if not is_hub:
                    raise self._load_error("the generation settings", error) from error
        if self.kind is ModelKind.ADAPTER:
            return self.base().generation_config()
        return GenerationConfig.from_model_config(self.config())

    def load_model(self, **arguments: Any) -> "PreTrainedModel":
        """Load a full model from its safetensors files.

        Args:
            arguments: passed on to transformers' `from_pretrained`.

        Raises:
            UserError: it cannot be loaded.
        """
        from transformers import AutoModelForCausalLM

        self.check_weights()
        try:
            return AutoModelForCausalLM.from_pretrained(
                self.name, use_safetensors=True, **_OUTPUT, **self._hub_arguments(), **arguments
            )
        except LOAD_ERRORS as error:
            raise self._load_error("the model", error) from error

    def download(self, *, local_files_only: bool = False) -> Path:
        """Return the folder with the model's files; those of a hub model are downloaded first.

        Args:
            local_files_only: take a hub model from the cache, without network.

        Raises:
            UserError: they cannot be downloaded.
        """
        from huggingface_hub import snapshot_download

        if self.kind is not ModelKind.HUB:
            return self.path
        try:
            found = snapshot_download(
                self.name, revision=self.revision, allow_patterns=_DOWNLOADED, local_files_only=local_files_only
            )
        except LOAD_ERRORS as error:
            raise self._load_error("the model", error) from error
        return Path(found)

    def _refuse_lfs_pointers(self, files: Iterable[str]) -> None:
        for file in files:
            if self.has(file):
                refuse_lfs_pointer(self.path / file)

    def _error(self, what: str, hint: str | None = None) -> UserError:
        return UserError(what, where=self.where, hint=hint)

    def _load_error(self, part: str, error: Exception) -> UserError:
        hint = "Check the name, the network and the login, or name a folder." if self.kind is ModelKind.HUB else None
        message = str(error)
        if "trust_remote_code" in message:
            code = "the model comes with code of its own, which transformers does not have"
            return self._error(code, "Read that code; `model.trust_remote_code: true` lets it run.")
        if "does not recognize this architecture" in message:
            hint = "Check `model_type` in config.json, or install a newer transformers."
        return self._error(f"{part} cannot be loaded: {first_line(error)}", hint)

    def _hub_arguments(self) -> dict[str, Any]:
        trust = self.trust_remote_code
        if trust is None:
            recipe = self.recipe()
            trust = recipe is not None and recipe.recipe.model.trust_remote_code
        arguments: dict[str, Any] = {"trust_remote_code": trust}
        return arguments if self.revision is None else {**arguments, "revision": self.revision}


def refuse_lfs_pointer(path: Path) -> None:
    """Check that a file is not the text that git leaves in its place where git-lfs did not run.

    https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md

    Raises:
        UserError: it is.
    """
    try:
        with path.open("rb") as stream:
            is_pointer = stream.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError:
        return  # Whoever reads the file reports it.
    if is_pointer:
        raise UserError(
            "the file is a git-lfs pointer, not the file itself",
            where=str(path),
            hint="Run `git lfs pull` in its repository, or download the file.",
        )


def read_index(path: Path) -> dict[str, str]:
    """Read the index of a sharded checkpoint: tensor -> the file that holds it.

    Raises:
        UserError: it cannot be read, or names no tensors.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(
            "the index of the shards has no `weight_map` with tensors",
            where=str(path),
            hint="Download the file again.",
        )
    return {str(tensor): str(name) for tensor, name in weight_map.items()}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    refuse_lfs_pointer(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"the file cannot be read: {first_line(error)}", where=str(path)) from error
    if not isinstance(found, dict):
        raise UserError("the file holds no JSON object", where=str(path))
    return found


def _open_base(name: str, revision: str | None, trust_remote_code: bool) -> ModelSource:
    where = f"base model: {name}"
    if name.startswith((".", "/", "~")) and not Path(name).exists():
        hint = "If it has moved, name its new place with `--base PATH`."
        raise UserError("the base that the adapter was trained on is not there", where=where, hint=hint)
    base = ModelSource.open(name, revision=revision, trust_remote_code=trust_remote_code, where=where)
    if base.kind is ModelKind.ADAPTER:
        raise UserError("expected a full model, got an adapter", where=where, hint="Name the model below it.")
    return base


def _kind_of(folder: Path) -> ModelKind:
    if not folder.exists():
        return ModelKind.HUB
    if (folder / ADAPTER_CONFIG).is_file():
        return ModelKind.ADAPTER
    if (folder / MODEL_CONFIG).is_file():
        return ModelKind.FULL
    return ModelKind.UNFINISHED if RunFolder(folder).is_run else ModelKind.EMPTY
