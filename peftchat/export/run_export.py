"""Export command: write a run or a model as GGUF or for Ollama."""

from dataclasses import dataclass
from pathlib import Path

from peftchat.errors import UserError
from peftchat.export.export_source import ExportSource
from peftchat.export.gguf import WrittenGguf, write_gguf
from peftchat.export.ollama import modelfile, read_frames
from peftchat.files import write_text
from peftchat.models.loading import end_ids


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """The user's options.

    Attributes:
        output: the GGUF file, or the folder for Ollama; None for one in the run's folder.
        type: type of the matrices; None keeps the stored one.
        overwrite: replace an existing file or folder.
        base: folder or hub id of an adapter's base; None for the one that it was trained on.
        allow_changed: export although base, tokenizer or template changed since the run.
    """

    output: Path | None = None
    type: str | None = None
    overwrite: bool = False
    base: str | None = None
    allow_changed: bool = False


def export_gguf(name: str, options: ExportOptions) -> WrittenGguf:
    """Write a run or a model as one GGUF file.

    Raises:
        UserError: it cannot be written as GGUF, or the file exists.
        VerificationError: the file differs from what was written.
    """
    _reject_existing(options.output, options)
    source = ExportSource.open(name, options.base, allow_changed=options.allow_changed)
    output = options.output or source.folder / _file_name(source, options)
    _reject_existing(output, options)
    return write_gguf(source, output, options.type)


def export_ollama(name: str, options: ExportOptions) -> WrittenGguf:
    """Write a folder for `ollama create`: a GGUF file and a Modelfile.

    Raises:
        UserError: as for `export_gguf`, or the chat template has no equivalent for Ollama.
        VerificationError: the file differs from what was written.
    """
    _reject_existing(options.output, options)
    source = ExportSource.open(name, options.base, allow_changed=options.allow_changed)
    folder = options.output or source.folder / "ollama"
    _reject_existing(folder, options)
    tokenizer = source.model.tokenizer()
    frames = read_frames(tokenizer, source.model.where)
    generation = source.model.generation_config()
    ends = end_ids(generation.eos_token_id) or end_ids(tokenizer.eos_token_id)
    stops = [str(token) for token in tokenizer.convert_ids_to_tokens(ends)]
    # Checked before the weights are written.
    modelfile(_file_name(source, options), frames, stops, generation, writes_bos=True)
    written = write_gguf(source, folder / _file_name(source, options), options.type)
    text = modelfile(written.path.name, frames, stops, generation, writes_bos=not written.adds_bos)
    write_text(folder / "Modelfile", text)
    return written


def _file_name(source: ExportSource, options: ExportOptions) -> str:
    return f"{source.name}-{options.type}.gguf" if options.type else f"{source.name}.gguf"


def _reject_existing(output: Path | None, options: ExportOptions) -> None:
    if output is not None and output.exists() and not options.overwrite:
        raise UserError("the output already exists", where=str(output), hint="Choose another with -o, or --overwrite.")
