"""Python code that loads a run with stock transformers and peft, as text for its model card."""

import io
from html import escape
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from peftchat.chat_template.templates import CHAT_TEMPLATES, TOKENIZER_TEMPLATE
from peftchat.formatting import format_bytes, format_count, format_decimal, format_duration, format_percent
from peftchat.recipe import QuantizationSection, Recipe
from peftchat.reports.verdict import cautions, verdict
from peftchat.runs.run_summary import RunSummary
from peftchat.variants import get_variant

_ASK = """
messages = [{"role": "user", "content": "How do I read a text file line by line?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs.to(model.device), generation_config=generation, max_new_tokens=256)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def loading_code(recipe: Recipe, facts: RunSummary) -> str:
    """A program that loads the run and answers one question.

    For an adapter whose new tokens lie beyond the base's vocabulary it first grows the base; where `run.json` does
    not know the size of that vocabulary, the program looks.
    """
    lines = _full_code(recipe) if recipe.method == "full" else _adapter_code(recipe, facts)
    return "\n".join(lines) + "\n" + _ASK


def new_vocabulary_size(facts: RunSummary) -> int | None:
    """Rows that the base's embeddings must have for the new tokens; `None` if they are known to have them."""
    if not facts.new_tokens:
        return None
    needed = max(token.id for token in facts.new_tokens) + 1
    if facts.base_vocabulary_size is not None and needed <= facts.base_vocabulary_size:
        return None
    return needed


def _full_code(recipe: Recipe) -> list[str]:
    arguments = "".join(f", {argument}" for argument in _trust(recipe))
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig",
        "",
        f'run = "{run_name(recipe)}"  # this folder',
        f"tokenizer = AutoTokenizer.from_pretrained(run{arguments})",
        "generation = GenerationConfig.from_pretrained(run)  # it stops at the end of the answer",
        f'model = AutoModelForCausalLM.from_pretrained(run, dtype="{recipe.model.dtype}"{arguments})',
    ]


def _adapter_code(recipe: Recipe, facts: RunSummary) -> list[str]:
    quantized = recipe.method == "qlora"
    names = "AutoModelForCausalLM, AutoTokenizer, GenerationConfig"
    lines = ["from peft import PeftModel"]
    if quantized:
        names = "AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig"
        lines.insert(0, "import torch")
    arguments = [f'dtype="{recipe.model.dtype}"', *_revision(recipe), *_trust(recipe)]
    lines += [
        f"from transformers import {names}",
        "",
        f'base = "{base_name(recipe)}"  # the model it was trained from',
        f'run = "{run_name(recipe)}"  # this folder',
        "tokenizer = AutoTokenizer.from_pretrained(run)",
        "generation = GenerationConfig.from_pretrained(run)  # it stops at the end of the answer",
    ]
    if quantized:
        lines += _quantization_code(recipe)
        arguments.append("quantization_config=quantization")
    lines.append(f"model = AutoModelForCausalLM.from_pretrained(base, {', '.join(arguments)})")
    return [*lines, *_growth(facts), *_rows_beside(recipe, facts), "model = PeftModel.from_pretrained(model, run)"]


def _rows_beside(recipe: Recipe, facts: RunSummary) -> list[str]:
    """Where PEFT's adapter has no place for the rows of new tokens they lie in one of their own."""
    if recipe.adapter is None or not facts.new_tokens or get_variant(recipe.adapter.variant).rows_inside:
        return []
    return ['model = PeftModel.from_pretrained(model, f"{run}/token_rows").merge_and_unload()  # new tokens']


def _growth(facts: RunSummary) -> list[str]:
    needed = new_vocabulary_size(facts)
    if needed is None:
        return []
    grow = f"model.resize_token_embeddings({needed}, mean_resizing=False)  # the adapter fills in the new rows"
    if facts.base_vocabulary_size is not None:
        return [grow]
    return [f"if model.get_input_embeddings().num_embeddings < {needed}:", f"    {grow}"]


def _quantization_code(recipe: Recipe) -> list[str]:
    chosen = recipe.quantization or QuantizationSection()
    if chosen.bits == 8:
        return ["quantization = BitsAndBytesConfig(load_in_8bit=True)"]
    return [
        "quantization = BitsAndBytesConfig(",
        "    load_in_4bit=True,",
        f'    bnb_4bit_quant_type="{chosen.type}",',
        f"    bnb_4bit_use_double_quant={chosen.double},",
        f"    bnb_4bit_compute_dtype=torch.{recipe.model.dtype},",
        ")",
    ]


def _revision(recipe: Recipe) -> list[str]:
    return [f'revision="{recipe.model.revision}"'] if recipe.model.revision else []


def _trust(recipe: Recipe) -> list[str]:
    return ["trust_remote_code=True"] if recipe.model.trust_remote_code else []


def base_is_local(recipe: Recipe) -> bool:
    """Whether the base is a folder on this machine rather than a hub id."""
    name = recipe.model.name
    return name.startswith((".", "~")) or Path(name).is_absolute() or Path(name).is_dir() or name.count("/") > 1


def base_name(recipe: Recipe) -> str:
    """The base as others may read it: its hub id, or the name of its folder without the path."""
    return _last_name(recipe.model.name) if base_is_local(recipe) else recipe.model.name


def run_name(recipe: Recipe) -> str:
    """The name of the run folder, without the folders above it."""
    return _last_name(recipe.output_dir)


def _last_name(path: str) -> str:
    return Path(path).resolve().name


def model_card(facts: RunSummary, recipe_text: str) -> str:
    """Markdown with YAML front matter: what the model is, how to load it, what it learned from, its limits.

    Of files only the names are written, never the folders they lie in.

    Args:
        facts: the run's results; any may be missing.
        recipe_text: the resolved recipe.

    Raises:
        pydantic.ValidationError: the text is not a recipe.
    """
    recipe = Recipe.model_validate(YAML(typ="safe").load(recipe_text))
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
    text = f"# {run_name(recipe)}\n\n{kind}: `{base_name(recipe)}`, fine-tuned on conversations with peftchat"
    return f"{text} ({_method(recipe)}). {verdict(facts).headline}"


def _method(recipe: Recipe) -> str:
    if recipe.adapter is None:
        return "full fine-tuning"
    return f"{recipe.adapter.variant} on a quantized base" if recipe.method == "qlora" else recipe.adapter.variant


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
    if template == TOKENIZER_TEMPLATE:
        name, stop = "the tokenizer's own chat template", "the template's end-of-turn token"
    else:
        name, stop = f"the chat template `{template}`", f"`{CHAT_TEMPLATES[template].end_token}`"
    lines = [f"## Format\n\nIt was trained with {name}, which is saved with the tokenizer. An answer ends at {stop}."]
    if recipe.chat.system is not None:
        lines.append(f"Conversations without a system message were given this one:\n\n{_quoted(recipe.chat.system)}")
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
        ("conversations", format_count(facts.train_examples), facts.train_examples),
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
