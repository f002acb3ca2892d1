"""The models of an evaluation: what a name stands for, the base of a run, and when kept answers are still theirs."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftchat.errors import UserError, first_line
from peftchat.hashing import FileDigest, digest_files
from peftchat.models.base_content import base_content, saved_files
from peftchat.models.source import ADAPTER_CONFIG, ModelKind, ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftchat.recipe import Recipe


@dataclass(frozen=True)
class EvaluatedModel:
    """A model of an evaluation, before it is loaded.

    Attributes:
        name: what reports call it.
        source: where it is.
        recipe: of the run that it is a part of: the run's own, or for a base that of the run trained on it; None for
            other models.
        is_base: whether it is the base of a run, which is loaded with the run's dtype and quantization.
        allow_changed: load it although base, tokenizer or template changed since the run.
    """

    name: str
    source: ModelSource
    recipe: "Recipe | None" = None
    is_base: bool = False
    allow_changed: bool = False

    @classmethod
    def open(cls, name: str, *, base: str | None = None, allow_changed: bool = False) -> "EvaluatedModel":
        """Open a run folder or a model.

        Args:
            name: a folder or a hub id.
            base: folder or hub id of an adapter's base; None for the one that it was trained on.
            allow_changed: load it although base, tokenizer or template changed since the run.

        Raises:
            UserError: there is no such model.
        """
        from peftchat.serving.chat_model import open_for_chat

        source, _ = open_for_chat(name, base=base, needs_template=False)
        loaded = None if source.kind is ModelKind.HUB else source.recipe()
        if source.kind is ModelKind.ADAPTER:
            _check_base(source.base())
        return cls(name, source, None if loaded is None else loaded.recipe, allow_changed=allow_changed)

    def base(self) -> "EvaluatedModel | None":
        """Return the base of a run or an adapter; None for a model without one.

        Raises:
            UserError: the base is not there.
        """
        if self.source.kind is ModelKind.ADAPTER:
            found = self.source.base()
        elif self.recipe is not None:
            found = ModelSource.of_recipe(self.recipe)
        else:
            return None
        _check_base(found)
        return EvaluatedModel("base", found, self.recipe, is_base=True)

    @property
    def precision(self) -> str:
        """The dtype and the quantization that it is loaded with, in words."""
        with_recipe = self.recipe is not None and (self.is_base or self.source.kind is ModelKind.ADAPTER)
        if self.recipe is None or not with_recipe:
            return "as saved"
        quantization = self.recipe.quantization
        if quantization is None:
            return self.recipe.model.dtype
        kind = quantization.type if quantization.bits == 4 else "int8"
        return f"{kind}, computed in {self.recipe.model.dtype}"

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Load the tokenizer.

        Raises:
            UserError: it cannot be loaded.
        """
        return self.source.tokenizer()

    def load(self) -> Any:
        """Load the model in evaluation mode, on the machine's accelerator.

        On a CPU without kernels for bfloat16 it computes in float32, as in a chat: that is many times as fast.

        Raises:
            UserError: it cannot be loaded.
        """
        from peftchat.models.loading import compute_in_float32_if_faster
        from peftchat.serving.chat_model import best_device, load_trained_base, load_with_adapter

        if self.is_base and self.recipe is not None:
            model: Any = load_trained_base(self.recipe, self.source)
            model = (model if self.recipe.quantization is not None else model.to(best_device())).eval()
        else:
            model = load_with_adapter(self.source, allow_changed=self.allow_changed)
        compute_in_float32_if_faster(model)
        return model

    def key(self) -> str:
        """Return a digest of the files that the model is made of and of how it is loaded."""
        from peftchat.serving.chat_model import bfloat16_is_slow

        files: dict[str, FileDigest] = {}
        base = self.source
        if self.source.kind is ModelKind.ADAPTER:
            files = _digests(self.source.path)
            base = self.source.base()
        content = base_content(base, exact=False)
        parts = [
            self.precision,
            content.base_commit,
            sorted((name, digest.bytes, digest.sample) for name, digest in content.base.items()) or base.name,
            sorted((name, digest.exact) for name, digest in files.items()),
            [] if self.source.kind is ModelKind.HUB else sorted(saved_files(self.source.path).items()),
        ]
        if bfloat16_is_slow():
            parts.append("float32")
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _check_base(base: ModelSource) -> None:
    base.require_model()
    if base.kind is not ModelKind.HUB:
        base.check_weights()


def _digests(folder: Path) -> dict[str, FileDigest]:
    """Return the digests of an adapter's files; those of added tokens may stand in a subfolder."""
    files = [folder / ADAPTER_CONFIG, *folder.glob("*.safetensors")]
    for config in folder.glob(f"*/{ADAPTER_CONFIG}"):
        files += [config, *config.parent.glob("*.safetensors")]
    try:
        return digest_files({str(file.relative_to(folder)): file for file in files if file.is_file()}, exact=True)
    except OSError as error:
        raise UserError(f"a file cannot be read: {first_line(error)}", where=str(folder)) from error
