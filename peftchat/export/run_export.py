"""One export from end to end."""

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
    """What the user may choose.

    Attributes:
        out: the GGUF file, or for Ollama the folder; None puts it into the run's folder.
        type: type of the matrices; None keeps the weights as they are stored.
        overwrite: replace what is already there.
    """

    out: Path | None = None
    type: str | None = None
    overwrite: bool = False


def export_gguf(path: str, options: ExportOptions) -> WrittenGguf:
    """Write a run or a model as one GGUF file.

    Raises:
        UserError: it cannot be written as GGUF, or the file is already there.
        VerificationError: what is on disk is not what was written.
    """
    _refuse_existing(options.out, options)
    source = ExportSource.open(path)
    out = options.out or source.folder / _file_name(source, options)
    _refuse_existing(out, options)
    return write_gguf(source, out, options.type)


def export_ollama(path: str, options: ExportOptions) -> WrittenGguf:
    """Write a folder that `ollama create` takes: a GGUF file and a Modelfile.

    Raises:
        UserError: as `export_gguf`, or the chat template has no plain form for Ollama.
        VerificationError: what is on disk is not what was written.
    """
    _refuse_existing(options.out, options)
    source = ExportSource.open(path)
    folder = options.out or source.folder / "ollama"
    _refuse_existing(folder, options)
    tokenizer = source.model.tokenizer()
    frames = read_frames(tokenizer, source.model.where)
    generation = source.model.generation_config()
    ends = end_ids(generation.eos_token_id) or end_ids(tokenizer.eos_token_id)
    stops = [str(token) for token in tokenizer.convert_ids_to_tokens(ends)]
    # Made before the weights are written: what it refuses is refused at once.
    modelfile(_file_name(source, options), frames, stops, generation, writes_start=True)
    written = write_gguf(source, folder / _file_name(source, options), options.type)
    text = modelfile(written.path.name, frames, stops, generation, writes_start=not written.adds_start)
    write_text(folder / "Modelfile", text)
    return written


def _file_name(source: ExportSource, options: ExportOptions) -> str:
    return f"{source.name}-{options.type}.gguf" if options.type else f"{source.name}.gguf"


def _refuse_existing(out: Path | None, options: ExportOptions) -> None:
    if out is not None and out.exists() and not options.overwrite:
        raise UserError("it is already there", where=str(out), hint="Choose another name with -o, or --overwrite.")
