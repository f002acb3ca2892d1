"""Export source: a model with complete weights; an adapter is merged first."""

from dataclasses import dataclass
from pathlib import Path

from peftchat.console import stderr
from peftchat.errors import UserError
from peftchat.models.source import MODEL_CONFIG, ModelKind, ModelSource


@dataclass(frozen=True)
class ExportSource:
    """A model to export.

    Attributes:
        model: the run or model: tokenizer, template and generation settings.
        name: the name of the exported model.
        folder: where results go by default.
    """

    model: ModelSource
    name: str
    folder: Path

    @classmethod
    def open(cls, name: str) -> "ExportSource":
        """Open a run folder, a model folder or a hub model.

        Raises:
            UserError: there is none.
        """
        model = ModelSource.open(name)
        model.require_model()
        if model.kind is ModelKind.HUB:
            return cls(model, name.rpartition("/")[2], Path.cwd())
        return cls(model, model.path.resolve().name, model.path)

    def full_model(self) -> ModelSource:
        """Return the model with its complete weights on disk.

        A hub model is downloaded. An adapter is merged into `RUN/merged` unless that is there already.

        Raises:
            UserError: it cannot be downloaded or merged, or the merged model is older than the adapter.
            VerificationError: the merge failed its verification.
        """
        folder = _merged(self.model.path) if self.model.kind is ModelKind.ADAPTER else self.model.download()
        return ModelSource.open(str(folder), local=True)


def _merged(run: Path) -> Path:
    from peftchat.merging import MergeOptions, merge_run

    merged = run / "merged"
    if not (merged / MODEL_CONFIG).is_file():
        stderr.print(f"The adapter is merged into {merged} first.", markup=False)
        return merge_run(run, MergeOptions()).folder
    if (merged / MODEL_CONFIG).stat().st_mtime < (run / "adapter_model.safetensors").stat().st_mtime:
        raise UserError(
            "the merged model is older than the adapter",
            where=str(merged),
            hint=f"Merge again: `peftchat merge {run} --overwrite`.",
        )
    return merged
