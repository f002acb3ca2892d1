"""`peftchat export`: export a run or a model to llama.cpp, Ollama or vLLM."""

from pathlib import Path

import click

from peftchat.cli.common import Command, NameType, allow_changed_option, base_option, output_option


@click.command("export", cls=Command, renamed={"--out": "--output"})
@click.argument("model", type=NameType())
@click.option(
    "--to",
    "target",
    type=click.Choice(["gguf", "ollama", "vllm"]),
    required=True,
    help="gguf: one file for llama.cpp. ollama: that file and a Modelfile. vllm: check the folder, print the command.",
)
@output_option("File, or for ollama the folder.  [default: in MODEL]")
@click.option(
    "--type",
    "type_name",
    type=click.Choice(["f32", "f16", "bf16", "q8_0"]),
    help="Dtype of the weight matrices.  [default: as stored]",
)
@base_option()
@allow_changed_option()
@click.option("--overwrite", is_flag=True, help="Replace existing files.")
def command(
    model: str,
    target: str,
    output: Path | None,
    type_name: str | None,
    base: str | None,
    allow_changed: bool,
    overwrite: bool,
) -> None:
    """Export a run or a model to llama.cpp, Ollama or vLLM.

    MODEL is a run folder, a merged model or a hub id. An adapter is merged first.

    \b
    peftchat export runs/assistant --to gguf --type q8_0
    peftchat export runs/assistant --to ollama && ollama create assistant -f runs/assistant/ollama/Modelfile
    $(peftchat export runs/assistant --to vllm)
    """
    from peftchat.errors import UserError, VerificationError

    if target == "vllm":
        from peftchat.export.vllm import vllm_support

        if output is not None or type_name is not None:
            raise UserError("vLLM reads the folder as it is: nothing is written", where="-o, --type")
        if base is not None or allow_changed:
            raise UserError("nothing is merged for vLLM", where="--base, --allow-changed", hint="Merge first.")
        support = vllm_support(model)
        if support.command is None:
            raise VerificationError(f"vLLM cannot serve {model}: {'; '.join(support.reasons)}")
        click.echo(support.command)
        return
    from peftchat.logging_setup import quiet_libraries

    quiet_libraries()
    from peftchat.console import stderr
    from peftchat.export.run_export import ExportOptions, export_gguf, export_ollama

    export = export_gguf if target == "gguf" else export_ollama
    written = export(model, ExportOptions(output, type_name, overwrite, base, allow_changed))
    stderr.print(f"{written.tensors} tensors, {written.type}, {written.bytes / 1e6:,.1f} MB, read back and equal.")
    if target == "ollama":
        modelfile = written.path.parent / "Modelfile"
        stderr.print(f"ollama create {written.path.stem} -f {modelfile}", markup=False)
        click.echo(modelfile)
    else:
        click.echo(written.path)
