"""`peftchat template`: what a chat template does to each kind of conversation."""

import itertools
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from peftchat.cli.common import Command, NameType, PathType, RecipeType, echo_json, json_option, note
from peftchat.errors import UserError, VerificationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from peftchat.chat_template.template_check import TemplateResult

_MOST = 1000
_REFUSALS_SHOWN = 8


@click.command("template", cls=Command)
@click.argument("name", metavar="MODEL|FILE", type=NameType())
@click.option("--model", type=NameType(), help="Folder or hub id whose tokenizer a FILE is tried with.")
@click.option("--data", type=PathType(), help=f"Check the first {_MOST:,} conversations of a file.")
@click.option("--end-token", help="Ends an answer where the template writes no token (`chat.end_token`).")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="A variable of `chat.template_kwargs`.")
@click.option("--recipe", type=RecipeType(), help="Take the settings of `chat` and `data.consecutive` from a recipe.")
@json_option("Print one JSON object a line: the template's ends, then each conversation.")
def command(
    name: str,
    model: str | None,
    data: Path | None,
    end_token: str | None,
    settings: tuple[str, ...],
    recipe: Path | None,
    as_json: bool,
) -> None:
    """Check that a template trains what the model will be asked for.

    Each answer of sample conversations, or of `--data`, must stand behind the prompt that the model gets for it. Print
    what the template does to each kind: right, how many examples it needs, or why it is refused. A FILE ends in
    `.jinja`. The status is 1 if an example is wrong, if plain conversations are refused, or if any of `--data` is.

    \b
    peftchat template Qwen/Qwen3-0.6B
    peftchat template my_template.jinja --model runs/demo --data data/train.jsonl
    peftchat template Qwen/Qwen3-0.6B --set enable_thinking=false
    """

    from peftchat.chat_template.chat_format import make_format
    from peftchat.chat_template.template_check import PLAIN, TemplateCheck, sample_conversations
    from peftchat.chat_template.template_settings import TemplateSettings

    chosen, system, consecutive = TemplateSettings(), None, "keep"
    if recipe is not None:
        from peftchat.recipe import load_recipe

        loaded = load_recipe(recipe, to_train=False).recipe
        chosen, system, consecutive = loaded.chat.template_settings, loaded.chat.system, loaded.data.consecutive
    variables = {**chosen.variables, **dict(_variable(setting) for setting in settings)}
    chosen = replace(chosen, variables=variables, end_token=end_token or chosen.end_token)
    tokenizer, template = _open(name, model)
    try:
        chat = make_format(template, system, tokenizer, settings=chosen)
    except UserError as error:
        if tokenizer.chat_template and error.where == "chat.template: model":
            # The template itself is what is checked here.
            raise VerificationError(f"{error.message}. {error.hint or ''}".strip()) from error
        raise
    ends = chat.template.end_tokens
    if data is None:
        conversations = iter(sample_conversations(ends[0]).items())
    else:
        from peftchat.conversations import read_conversations
        from peftchat.conversations.problems import ReadOptions

        found = read_conversations(data, options=ReadOptions(consecutive=consecutive))
        conversations = ((one.source, one) for one in itertools.islice(found, _MOST))
    results = list(TemplateCheck(chat, variables).check(conversations))
    if as_json:
        echo_json({"template": name, "end_tokens": list(ends), "date": chat.template.written_date})
        for result in results:
            echo_json(asdict(result))
    else:
        click.echo(f"An answer ends with {' or '.join(ends)}.")
        if chat.template.written_date:
            click.echo("The template writes the date; `chat.template_date` sets it.")
        if data is None:
            _print_samples(results)
        else:
            _print_counts(results)
    _judge(results, PLAIN if data is None else None)


def _variable(setting: str) -> tuple[str, object]:
    """Return name and value of a `--set`.

    Raises:
        UserError: it has no `=`, or the value is no YAML.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    name, equals, value = setting.partition("=")
    try:
        if equals and name.isidentifier():
            return name, YAML(typ="safe").load(value)
    except YAMLError:
        pass
    raise UserError(
        f"{setting!r} is not NAME=VALUE", where="--set", hint="Write it like `--set enable_thinking=false`."
    )


def _open(name: str, model: str | None) -> tuple["PreTrainedTokenizerBase", str]:
    """Return a tokenizer and the value of `chat.template` for it.

    Raises:
        UserError: the file or the model does not exist.
    """
    from peftchat.chat_template.template_check import stand_in_tokenizer
    from peftchat.chat_template.templates import CHAT_TEMPLATES, TEMPLATE_SUFFIX, TOKENIZER_TEMPLATE
    from peftchat.models.source import ModelSource

    if name in CHAT_TEMPLATES and model is not None:
        return ModelSource.open(model).tokenizer(), name
    if not name.endswith(TEMPLATE_SUFFIX):
        if model is not None:
            raise UserError(
                f"{name} is no {TEMPLATE_SUFFIX} file, and `--model` is only for one",
                where="--model",
                hint="Leave out `--model`, or name a template file.",
            )
        return ModelSource.open(name).tokenizer(), TOKENIZER_TEMPLATE
    if model is not None:
        return ModelSource.open(model).tokenizer(), name
    try:
        source = Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"the template cannot be read: {error}", where=name, hint="Check the path.") from error
    note("Tried with a tokenizer of bytes; give `--model` for the model's own.")
    return stand_in_tokenizer(source), TOKENIZER_TEMPLATE


def _state(result: "TemplateResult") -> str:
    if result.fault:
        return f"WRONG: {result.fault}"
    if result.refusal:
        return f"refused: {result.refusal}"
    if result.examples > 1:
        return f"right, in {result.examples} examples: the template rewrites earlier turns"
    return "right"


def _print_samples(results: "Sequence[TemplateResult]") -> None:
    width = max(len(result.kind) for result in results)
    for result in results:
        click.echo(f"{result.kind:{width}}  {_state(result)}")


def _print_counts(results: "Sequence[TemplateResult]") -> None:
    right = [result for result in results if not (result.refusal or result.fault)]
    examples = sum(result.examples for result in right)
    click.echo(f"{len(right):,} of {len(results):,} conversations are right; they become {examples:,} examples.")
    reasons = Counter(result.refusal for result in results if result.refusal)
    for reason, count in reasons.most_common(_REFUSALS_SHOWN):
        first = next(result.kind for result in results if result.refusal == reason)
        click.echo(f"{count:,} refused, first {first}: {reason}")
    if len(reasons) > _REFUSALS_SHOWN:
        click.echo(f"… and {len(reasons) - _REFUSALS_SHOWN:,} other reasons; `--json` prints all.")
    for result in results:
        if result.fault:
            click.echo(f"{result.kind}: {_state(result)}")


def _judge(results: "Sequence[TemplateResult]", plain: tuple[str, ...] | None) -> None:
    """Fail if an example is wrong, or if what must be trained is refused.

    Raises:
        VerificationError: says how many.
    """
    if not results:
        raise UserError("there is no conversation", where="--data", hint="Name a file with conversations.")
    wrong = sum(bool(result.fault) for result in results)
    if wrong:
        raise VerificationError(f"{wrong:,} of {len(results):,} conversations do not stand behind their prompts")
    refused = [result for result in results if result.refusal and (plain is None or result.kind in plain)]
    if refused:
        what = "plain conversations" if plain else "conversations of the data"
        raise VerificationError(f"the template refuses {len(refused):,} {what}")
