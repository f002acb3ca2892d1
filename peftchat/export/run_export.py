"""Export command: write a run or a model as GGUF or for Ollama."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from peftchat.errors import UserError
from peftchat.export.export_source import ExportSource
from peftchat.export.gguf import WrittenGguf, is_own_gguf, write_gguf
from peftchat.export.ollama import MODELFILE, is_own_modelfile, modelfile, read_frames
from peftchat.files import write_text
from peftchat.models.loading import end_ids
from peftchat.output_paths import InputPath, check_output, check_output_file


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
    source = ExportSource.open(name, options.base, allow_changed=options.allow_changed)
    output = options.output or source.folder / _file_name(source, options)
    return write_gguf(source, _usable_file(output, source, options), options.type)


def export_ollama(name: str, options: ExportOptions) -> WrittenGguf:
    """Write a folder for `ollama create`: a GGUF file and a Modelfile.

    Raises:
        UserError: as for `export_gguf`, or the chat template has no equivalent for Ollama.
        VerificationError: the file differs from what was written.
    """
    source = ExportSource.open(name, options.base, allow_changed=options.allow_changed)
    folder = options.output or source.folder / "ollama"
    if folder.exists() and not folder.is_dir():
        raise UserError("the output is a file, expected a folder", where=str(folder), hint="Choose another with -o.")
    if folder.exists() and not options.overwrite:
        raise UserError("the output already exists", where=str(folder), hint="Choose another with -o, or --overwrite.")
    check_output(folder, _inputs(source), str(folder))
    gguf = _usable_file(folder / _file_name(source, options), source, options)
    model_file = check_output_file(
        folder / MODELFILE, _inputs(source), str(folder / MODELFILE), is_ours=is_own_modelfile, kind="a Modelfile"
    )
    tokenizer = source.model.tokenizer()
    frames = read_frames(tokenizer, source.model.where)
    generation = source.model.generation_config()
    ends = end_ids(generation.eos_token_id) or end_ids(tokenizer.eos_token_id)
    stops = [str(token) for token in tokenizer.convert_ids_to_tokens(ends)]
    # Checked before the weights are written.
    modelfile(_file_name(source, options), frames, stops, generation, writes_bos=True)
    written = write_gguf(source, gguf, options.type)
    text = modelfile(written.path.name, frames, stops, generation, writes_bos=not written.adds_bos)
    write_text(model_file, text)
    return written


def _file_name(source: ExportSource, options: ExportOptions) -> str:
    return f"{source.name}-{options.type}.gguf" if options.type else f"{source.name}.gguf"


def _usable_file(output: Path, source: ExportSource, options: ExportOptions) -> Path:
    """Return the file to write to, links followed.

    Raises:
        UserError: something is there that may not be replaced.
    """
    where = str(output)
    if os.path.lexists(output) and not options.overwrite:
        raise UserError("the output already exists", where=where, hint="Choose another with -o, or --overwrite.")
    return check_output_file(output, _inputs(source), where, is_ours=is_own_gguf, kind="a GGUF file")


def _inputs(source: ExportSource) -> list[InputPath]:
    """Return what an export reads: the model, the run's recipe and the base."""
    recipe = source.model.recipe()
    named = [] if recipe is None else [replace(entry, is_read_recursively=False) for entry in recipe.inputs()]
    files = [InputPath(file, "a file of the model") for file in sorted(source.model.path.glob("*")) if file.is_file()]
    own = [entry for entry in files if entry.path.suffix != ".gguf"]
    return [InputPath(source.model.path, "the model"), *own, *named]
