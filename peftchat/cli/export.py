"""`peftchat export`: export a run or a model to llama.cpp, Ollama or vLLM, or an adapter to plain LoRA."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from peftchat.cli.common import (
    Command,
    NameType,
    allow_changed_option,
    base_option,
    echo_json,
    json_option,
    output_option,
)

if TYPE_CHECKING:
    from peftchat.export.lora import ConversionReport, LoraOptions


@click.command("export", cls=Command, renamed={"--out": "--output"})
@click.argument("model", type=NameType())
@click.option(
    "--to",
    "target",
    type=click.Choice(["gguf", "ollama", "vllm", "lora"]),
    required=True,
    help="gguf: one file for llama.cpp. ollama: that file and a Modelfile. vllm: check the folder, print the command. "
    "lora: turn an adapter of another kind, or of a higher rank, into a plain LoRA.",
)
@output_option("File, or for ollama and lora the folder.  [default: in MODEL]")
@click.option(
    "--type",
    "type_name",
    type=click.Choice(["f32", "f16", "bf16", "q8_0"]),
    help="Dtype of the weight matrices.  [default: as stored]",
)
@click.option(
    "--rank", type=int, help="lora: the rank.  [default: the smallest power of two within the tolerance, up to 512]"
)
@click.option(
    "--tolerance",
    type=float,
    help="lora: largest KL divergence from the adapter, and largest rise of its loss, in nats per token."
    "  [default: 0.01]",
)
@base_option()
@allow_changed_option()
@click.option("--overwrite", is_flag=True, help="Replace existing files.")
@json_option("lora: print the report as one JSON object.")
def command(
    model: str,
    target: str,
    output: Path | None,
    type_name: str | None,
    rank: int | None,
    tolerance: float | None,
    base: str | None,
    allow_changed: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Export a model to llama.cpp, Ollama, vLLM or a plain LoRA.

    MODEL is a run folder, a merged model or a hub id. For gguf and ollama, an adapter is merged first.

    \b
    peftchat export runs/assistant --to gguf --type q8_0
    peftchat export runs/assistant --to ollama && ollama create assistant -f runs/assistant/ollama/Modelfile
    $(peftchat export runs/assistant --to vllm)
    peftchat export runs/dora --to lora --rank 32
    """
    from peftchat.errors import UserError, VerificationError

    if target == "lora":
        from peftchat.export.lora import LoraOptions

        if type_name is not None:
            raise UserError("a LoRA is written in float32", where="--type", hint="Leave the option out.")
        _convert(model, LoraOptions(output, rank, tolerance, overwrite, base, allow_changed), as_json=as_json)
        return
    if rank is not None or tolerance is not None or as_json:
        raise UserError(f"only `--to lora` has these options, got `--to {target}`", where="--rank, --tolerance, --json")
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


def _convert(model: str, options: "LoraOptions", *, as_json: bool) -> None:

    from peftchat.export.lora import export_lora

    folder, report = export_lora(Path(model), options)
    if as_json:
        echo_json({"folder": str(folder), **report.as_dict()})
        return
    _print_conversion(report)
    click.echo(folder)


def _print_conversion(report: "ConversionReport") -> None:
    from rich.table import Table

    from peftchat.console import stderr

    table = Table("rank", "loss", "KL", "same token", "left out", "", title="Ranks compared", title_justify="left")
    table.add_row(report.method, f"{report.proof.loss_before:.4f}", "", "", "", "as trained")
    for one in report.tried:
        table.add_row(
            str(one.rank),
            f"{one.loss_after:.4f}",
            f"{one.kl:.1e}",
            f"{one.top1_agreement:.1%}",
            f"{one.update_error:.1%}",
            "written" if one.rank == report.rank else "",
        )
    stderr.print(table)
    proof = report.proof
    stderr.print(
        f"Converted {report.method} to a LoRA of rank {report.rank}: {report.modules} layers, "
        f"{report.parameters_before:,} → {report.parameters_after:,} parameters, {report.seconds:.1f} s.\n"
        f"On {report.tokens} tokens of {report.conversations} {report.data}: loss {proof.loss_before:.4f} → "
        f"{proof.loss_after:.4f}, KL {proof.kl:.1e} nats per token (allowed: {report.tolerance:g}), same next token at "
        f"{proof.top1_agreement:.1%}.",
        markup=False,
        highlight=False,
    )
    if report.vllm is None:
        stderr.print(f"vLLM cannot serve it beside its base: {'; '.join(report.vllm_reasons)}.", markup=False)
    else:
        stderr.print(report.vllm, markup=False, soft_wrap=True)
