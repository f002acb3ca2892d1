"""The model card (`README.md`) of a run folder, in the form that model hubs read."""

import io
from collections.abc import Mapping
from html import escape
from typing import Any

from ruamel.yaml import YAML

from peftchat.chat_template.templates import chatml, starchat
from peftchat.formatting import format_bytes, format_count, format_decimal, format_duration, format_percent
from peftchat.recipe import Recipe
from peftchat.reports.loading_code import base_is_local, base_name, loading_code, new_vocabulary_size, run_name
from peftchat.reports.verdict import cautions, verdict
from peftchat.runs.run_summary import RunSummary
from peftchat.variants import get_variant

_END_TOKENS = {"starchat": starchat(None).end_token, "chatml": chatml(None).end_token}


def model_card(run_json: Mapping[str, Any], recipe_text: str) -> str:
    """Markdown with YAML front matter: what the model is, how to load it, what it learned from, its limits.

    Of files only the names are written, never the folders they lie in.

    Args:
        run_json: the content of `run.json`; keys may be missing.
        recipe_text: the resolved recipe.

    Raises:
        pydantic.ValidationError: the text is not a recipe, or a key of `run_json` is of another kind.
    """
    recipe = Recipe.model_validate(YAML(typ="safe").load(recipe_text))
    facts = RunSummary.of(run_json)
    sections = [
        _front_matter(recipe),
        _introduction(recipe, facts),
        _use(recipe, facts),
        _format(recipe, facts),
        _training(recipe, facts),
        _limits(facts),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(recipe: Recipe) -> str:
    adapter = recipe.method != "full"
    fields: dict[str, Any] = {}
    if not base_is_local(recipe):
        fields["base_model"] = recipe.model.name
        fields["base_model_relation"] = "adapter" if adapter else "finetune"
    fields["library_name"] = "peft" if adapter else "transformers"
    fields["pipeline_tag"] = "text-generation"
    variant = [recipe.adapter.variant] if recipe.adapter else []
    fields["tags"] = list(dict.fromkeys(["chat", "peftchat", recipe.method, *variant]))
    text = io.StringIO()
    YAML().dump(fields, text)
    return f"---\n{text.getvalue()}---"


def _introduction(recipe: Recipe, facts: RunSummary) -> str:
    kind = "A chat model" if recipe.method == "full" else "A chat adapter"
    text = f"# {run_name(recipe)}\n\n{kind}: `{base_name(recipe)}`, fine-tuned on dialogues with peftchat"
    return f"{text} ({_method(recipe)}). {verdict(facts).headline}"


def _method(recipe: Recipe) -> str:
    if recipe.adapter is None:
        return "full fine-tuning"
    return f"{recipe.adapter.variant} on a quantised base" if recipe.method == "qlora" else recipe.adapter.variant


def _use(recipe: Recipe, facts: RunSummary) -> str:
    parts = ["## Use it", f"```python\n{loading_code(recipe, facts)}```"]
    if recipe.method == "full":
        parts.append("vLLM serves this folder as it is.")
        return "\n\n".join(parts)
    needed = new_vocabulary_size(facts)
    if needed is not None:
        parts.append(
            f"The adapter carries rows for tokens up to id {needed - 1}. A base with fewer rows than that must be "
            "grown first, as above; without it PEFT stops with an `IndexError` when it puts the rows in their place."
        )
    if recipe.adapter is not None and not get_variant(recipe.adapter.variant).folds:
        parts.append("It cannot be folded into the base: the two belong together, and vLLM does not serve them.")
        parts.append(f"To talk to it in the terminal: `peftchat chat {run_name(recipe)}`.")
        return "\n\n".join(parts)
    merge = f"`peftchat merge {run_name(recipe)}` folds the adapter into the base's weights"
    if facts.new_tokens:
        parts.append(f"vLLM does not serve adapters that bring rows for new tokens: {merge}, and vLLM serves those.")
    else:
        parts.append(f"{merge}, for programs that do not load adapters.")
    parts.append(f"To talk to it in the terminal: `peftchat chat {run_name(recipe)}`.")
    return "\n\n".join(parts)


def _format(recipe: Recipe, facts: RunSummary) -> str:
    template = recipe.chat.template
    own = "the tokenizer's own chat template" if template == "model" else f"the chat template `{template}`"
    end = _END_TOKENS.get(template)
    stop = f"`{end}`" if end else "the template's end-of-turn token"
    lines = [f"## Format\n\nIt was trained with {own}, which is saved with the tokenizer. An answer ends at {stop}."]
    if recipe.chat.system is not None:
        lines.append(f"Dialogues without a system message were given this one:\n\n{_quoted(recipe.chat.system)}")
    if facts.new_tokens:
        names = ", ".join(f"`{token.token}` ({token.id})" for token in facts.new_tokens)
        lines.append(f"Tokens added to the base's vocabulary: {names}.")
    return "\n\n".join(lines)


def _quoted(text: str) -> str:
    """An indented block: Markdown shows it as it is, whatever it holds."""
    return "\n".join(f"    {line}" for line in text.splitlines()) if text else "    (empty)"


def _training(recipe: Recipe, facts: RunSummary) -> str:
    names = ", ".join(f"`{_data_name(get_variant.path)}`" for get_variant in recipe.data.train)
    lines = [f"- data: {names}", f"- method: {recipe.method}"]
    if recipe.adapter is not None:
        options = recipe.adapter.model_dump(mode="json", exclude_none=True)
        lines.append("- adapter: " + ", ".join(f"{name} {_option(value)}" for name, value in options.items()))
    rows = [
        ("dialogues", format_count(facts.rows), facts.rows),
        (
            "tokens seen",
            f"{format_count(facts.tokens)}, loss on {format_percent(facts.supervised_share)}",
            facts.tokens,
        ),
        ("steps", format_count(facts.steps), facts.steps),
        ("learning rate", format_decimal(recipe.training.learning_rate), recipe.training.learning_rate),
        ("trained parameters", format_count(facts.trainable_parameters), facts.trainable_parameters),
        ("held-out loss before", format_decimal(facts.eval_loss_before), facts.eval_loss_before),
        ("held-out loss after", format_decimal(facts.eval_loss), facts.eval_loss),
        ("training loss, mean", format_decimal(facts.train_loss), facts.train_loss),
        ("time", format_duration(facts.seconds), facts.seconds),
        ("speed", f"{format_count(facts.tokens_per_second)} tokens/s", facts.tokens_per_second),
        ("peak memory", format_bytes(facts.peak_memory_bytes), facts.peak_memory_bytes),
    ]
    lines += [f"- {name}: {words}" for name, words, value in rows if value is not None]
    if facts.versions:
        lines.append("- " + ", ".join(f"{name} {version}" for name, version in facts.versions.items() if version))
    return "## Training\n\n" + "\n".join(lines)


def _option(value: object) -> str:
    return " ".join(str(part) for part in value) if isinstance(value, list) else str(value)


def _data_name(path: str) -> str:
    """A hub id as it is, a file or folder without the folders above it."""
    is_hub_id = path.count("/") == 1 and not path.startswith((".", "/", "~")) and "." not in path.rsplit("/")[-1]
    return path if is_hub_id else path.rstrip("/").rsplit("/")[-1]


def _limits(facts: RunSummary) -> str:
    found = [*cautions(facts), "Nothing in this run measured whether its answers are true or safe."]
    # A token such as <s> would be taken for an HTML tag.
    return "## Limits\n\n" + "\n".join(f"- {escape(caution, quote=False)}" for caution in found)
