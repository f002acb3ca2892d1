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
        allow_changed: export although base, tokenizer or template changed since the run.
    """

    model: ModelSource
    name: str
    folder: Path
    allow_changed: bool = False

    @classmethod
    def open(cls, name: str, base: str | None = None, *, allow_changed: bool = False) -> "ExportSource":
        """Open a run folder, a model folder or a hub model.

        Args:
            name: folder or hub id.
            base: folder or hub id of an adapter's base; None for the one that it was trained on.
            allow_changed: export although base, tokenizer or template changed since the run.

        Raises:
            UserError: there is none.
        """
        model = ModelSource.open(name, base=base)
        model.require_model()
        if model.kind is ModelKind.HUB:
            return cls(model, name.rpartition("/")[2], Path.cwd())
        return cls(model, model.path.resolve().name, model.path, allow_changed)

    def full_model(self) -> ModelSource:
        """Return the model with its complete weights on disk.

        A hub model is downloaded. An adapter is merged into `RUN/merged` unless that is there already.

        Raises:
            UserError: it cannot be downloaded or merged, or the merged model is older than the adapter.
            VerificationError: the merge failed its verification.
        """
        folder = (
            _merged(self.model, allow_changed=self.allow_changed)
            if self.model.kind is ModelKind.ADAPTER
            else self.model.download()
        )
        return ModelSource.open(str(folder), local=True)


def _merged(adapter: ModelSource, *, allow_changed: bool) -> Path:
    from peftchat.merging import MergeOptions, merge_run

    run = adapter.path
    merged = run / "merged"
    if not (merged / MODEL_CONFIG).is_file():
        stderr.print(f"The adapter is merged into {merged} first.", markup=False)
        return merge_run(run, MergeOptions(base_model=adapter.base_name, allow_changed=allow_changed)).folder
    if (merged / MODEL_CONFIG).stat().st_mtime < (run / "adapter_model.safetensors").stat().st_mtime:
        raise UserError(
            "the merged model is older than the adapter",
            where=str(merged),
            hint=f"Merge again: `peftchat merge {run} --overwrite`.",
        )
    return merged
