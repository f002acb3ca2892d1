"""What is exported: a folder of whole weights, merged first where a run holds an adapter."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftchat.console import stderr
from peftchat.errors import UserError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


@dataclass(frozen=True)
class ExportSource:
    """A model to export.

    Attributes:
        folder: the run or model folder: tokenizer, template and generation settings.
        name: what to call the result.
        home: the folder that results go into by default.
        is_adapter: whether the weights must be merged before they are whole.
    """

    folder: Path
    name: str
    home: Path
    is_adapter: bool = False

    def weights(self) -> Path:
        """The folder of whole weights; an adapter is merged into `RUN/merged` if that is not there yet.

        Raises:
            UserError: it cannot be merged, or what was merged is older than the adapter.
            VerificationError: the merge did not pass its proof.
        """
        return _merged(self.folder) if self.is_adapter else self.folder

    def base_config(self) -> Any:
        """The config of the model as it was before training, which is known without merging."""
        if not self.is_adapter:
            return read_source_config(self.folder)
        from peftchat.merging.adapter_source import base_config, find_base, open_adapter_source

        run = open_adapter_source(self.folder)
        return base_config(find_base(run.base, run.revision), run.trust_remote_code).get_text_config()

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The model's tokenizer.

        Raises:
            UserError: it cannot be read.
        """
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(str(self.folder))
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise UserError(f"no usable tokenizer: {str(error).splitlines()[0]}", where=str(self.folder)) from error

    def generation(self) -> "GenerationConfig":
        """The model's generation settings; transformers' defaults where it has none."""
        from transformers import GenerationConfig

        if (self.folder / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(str(self.folder))
        return GenerationConfig()


def read_source_config(folder: Path) -> Any:
    """The transformers config of a model folder.

    Raises:
        UserError: it cannot be read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(folder)).get_text_config()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"no usable model config: {str(error).splitlines()[0]}", where=str(folder)) from error


def open_source(path: str) -> ExportSource:
    """Find a run folder, a model folder or a hub model, which is fetched.

    Raises:
        UserError: there is none.
    """
    folder = Path(path)
    if (folder / "adapter_config.json").is_file():
        return ExportSource(folder, folder.resolve().name, folder, is_adapter=True)
    if (folder / "config.json").is_file():
        return ExportSource(folder, folder.resolve().name, folder)
    if folder.exists():
        raise UserError("neither a finished run nor a model", where=path, hint="Name a run folder or a model folder.")
    return ExportSource(_fetched(path), path.rpartition("/")[2], Path.cwd())


def _merged(run: Path) -> Path:
    from peftchat.merging import MergeOptions, merge_run

    merged = run / "merged"
    if not (merged / "config.json").is_file():
        stderr.print(f"The adapter is merged into {merged} first.", markup=False)
        return merge_run(run, MergeOptions()).folder
    if (merged / "config.json").stat().st_mtime < (run / "adapter_model.safetensors").stat().st_mtime:
        raise UserError(
            "the merged model is older than the adapter",
            where=str(merged),
            hint=f"Merge again: `peftchat merge {run} --overwrite`.",
        )
    return merged


def _fetched(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"there is no such folder, and it cannot be fetched: {reason}", where=name) from error
