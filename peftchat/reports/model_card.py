"""Model card of a run: Markdown with metadata, code to load the run, its training and its limits."""

import io
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML

from peftchat.chat_template.templates import CHAT_TEMPLATES, TOKENIZER_TEMPLATE
from peftchat.errors import UserError, first_line
from peftchat.formatting import format_bytes, format_count, format_decimal, format_duration, format_percent
from peftchat.recipe import QuantizationSection, Recipe
from peftchat.reports.assessment import assess_run, run_warnings
from peftchat.runs.run_summary import RunSummary

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

_EXAMPLE_PROMPT = """
messages = [{"role": "user", "content": "How do I read a text file line by line?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs.to(model.device), generation_config=generation, max_new_tokens=256)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def read_card(text: str, where: str) -> "ModelCard":
    """Read a card as huggingface_hub does.

    Args:
        text: the card.
        where: how error messages refer to it.

    Raises:
        UserError: its metadata cannot be read.
    """
    import yaml
    from huggingface_hub import ModelCard

    try:
        return ModelCard(text, ignore_metadata_errors=False)
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        what = f"the card's metadata cannot be read: {first_line(error)}"
        raise UserError(what, where=where, hint="Mend it, or remove the file.") from error


def loading_code(recipe: Recipe, summary: RunSummary) -> str:
    """Return a program that loads the run and answers one question.

    If an adapter's new tokens are beyond the base model's vocabulary, the program first resizes the embeddings. If
    `run.json` does not have the size of that vocabulary, the program checks it.
    """
    lines = _full_code(recipe) if recipe.method == "full" else _adapter_code(recipe, summary)
    return "\n".join(lines) + "\n" + _EXAMPLE_PROMPT


def new_vocabulary_size(summary: RunSummary) -> int | None:
    """Return the size to which the base model's embeddings must be resized; None if they are large enough."""
    if not summary.new_tokens:
        return None
    needed = max(token.id for token in summary.new_tokens) + 1
    if summary.base_vocabulary_size is not None and needed <= summary.base_vocabulary_size:
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


def _adapter_code(recipe: Recipe, summary: RunSummary) -> list[str]:
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
    return [
        *lines,
        *_growth(summary),
        *_load_added_tokens(recipe, summary),
        "model = PeftModel.from_pretrained(model, run)",
    ]


def _load_added_tokens(recipe: Recipe, summary: RunSummary) -> list[str]:
    """Return code that loads added tokens from an adapter of their own, if the variant needs one."""
    if recipe.adapter is None or not summary.new_tokens or recipe.adapter.supports_trainable_tokens:
        return []
    return ['model = PeftModel.from_pretrained(model, f"{run}/token_rows").merge_and_unload()  # new tokens']


def _growth(summary: RunSummary) -> list[str]:
    needed = new_vocabulary_size(summary)
    if needed is None:
        return []
    grow = f"model.resize_token_embeddings({needed}, mean_resizing=False)  # the adapter fills in the new rows"
    if summary.base_vocabulary_size is not None:
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


def model_card(summary: RunSummary, recipe_text: str) -> str:
    """Markdown with YAML front matter: what the model is, how to load it, what it learned from, its limits.

    Of files only the names are written, never the folders they lie in.

    Args:
        summary: the run's results; any may be missing.
        recipe_text: the resolved recipe.

    Raises:
        pydantic.ValidationError: the text is not a recipe.
    """
    recipe = Recipe.model_validate(YAML(typ="safe").load(recipe_text))
    sections = [
        _front_matter(recipe),
        _introduction(recipe, summary),
        _use(recipe, summary),
        _format(recipe, summary),
        _training(recipe, summary),
        _limits(summary),
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


def _introduction(recipe: Recipe, summary: RunSummary) -> str:
    kind = "A chat model" if recipe.method == "full" else "A chat adapter"
    text = f"# {run_name(recipe)}\n\n{kind}: `{base_name(recipe)}`, fine-tuned on {_kind_of_data(recipe)} with peftchat"
    return f"{text} ({_method(recipe)}). {assess_run(summary).headline}"


def _kind_of_data(recipe: Recipe) -> str:
    if recipe.has_labels:
        return f"answers labeled good or bad ({recipe.objective})"
    return f"pairs of preferred and rejected answers ({recipe.objective})" if recipe.has_pairs else "conversations"


def _method(recipe: Recipe) -> str:
    if recipe.adapter is None:
        return "full fine-tuning"
    return f"{recipe.adapter.variant} on a quantized base" if recipe.method == "qlora" else recipe.adapter.variant


def _use(recipe: Recipe, summary: RunSummary) -> str:
    parts = ["## Use it", f"```python\n{loading_code(recipe, summary)}```"]
    if recipe.method == "full":
        parts.append("vLLM serves this folder as it is.")
        return "\n\n".join(parts)
    needed = new_vocabulary_size(summary)
    if needed is not None:
        parts.append(
            f"The adapter has embeddings for tokens up to id {needed - 1}. A base model with a smaller vocabulary must "
            "be resized first, as above; otherwise PEFT raises an `IndexError` when it loads them."
        )
    if recipe.adapter is not None and not recipe.adapter.mergeable:
        parts.append("It cannot be merged into the base model, and vLLM does not serve it.")
        parts.append(f"To chat with it in the terminal: `peftchat chat {run_name(recipe)}`.")
        return "\n\n".join(parts)
    merge = f"`peftchat merge {run_name(recipe)}` merges the adapter into the base model"
    if summary.new_tokens:
        parts.append(f"vLLM does not serve adapters with embeddings of new tokens. {merge}, which vLLM serves.")
    else:
        parts.append(f"{merge}, for programs that do not load adapters.")
    parts.append(f"To chat with it in the terminal: `peftchat chat {run_name(recipe)}`.")
    return "\n\n".join(parts)


def _format(recipe: Recipe, summary: RunSummary) -> str:
    template = recipe.chat.template
    if template not in CHAT_TEMPLATES:
        own = "the tokenizer's own chat template"
        name = own if template == TOKENIZER_TEMPLATE else f"the chat template `{Path(template).name}`"
        stop = "the template's end-of-turn token"
    else:
        name, stop = f"the chat template `{template}`", f"`{CHAT_TEMPLATES[template].end_token}`"
    lines = [f"## Format\n\nIt was trained with {name}, which is saved with the tokenizer. An answer ends at {stop}."]
    if recipe.chat.system is not None:
        lines.append(f"Conversations without a system message were given this one:\n\n{_quoted(recipe.chat.system)}")
    if summary.new_tokens:
        names = ", ".join(f"`{token.token}` ({token.id})" for token in summary.new_tokens)
        lines.append(f"Tokens added to the base's vocabulary: {names}.")
    return "\n\n".join(lines)


def _quoted(text: str) -> str:
    """An indented block: Markdown shows it as it is, whatever it holds."""
    return "\n".join(f"    {line}" for line in text.splitlines()) if text else "    (empty)"


def _training(recipe: Recipe, summary: RunSummary) -> str:
    names = ", ".join(f"`{_data_name(source.path)}`" for source in recipe.data.train)
    lines = [f"- data: {names}", f"- method: {recipe.method}"]
    if recipe.has_pairs:
        options = getattr(recipe, recipe.objective).model_dump(mode="json", exclude_none=True)
        lines.append(f"- objective: {recipe.objective}, " + ", ".join(f"{key} {one}" for key, one in options.items()))
    if recipe.adapter is not None:
        options = recipe.adapter.model_dump(mode="json", exclude_none=True)
        lines.append("- adapter: " + ", ".join(f"{name} {_option(value)}" for name, value in options.items()))
    rows = [
        (summary.unit, format_count(summary.train_examples), summary.train_examples),
        (
            "tokens seen",
            f"{format_count(summary.tokens)}, loss on {format_percent(summary.supervised_share)}",
            summary.tokens,
        ),
        ("steps", format_count(summary.steps), summary.steps),
        ("learning rate", format_decimal(recipe.training.peak_rate), recipe.training.peak_rate),
        ("trained parameters", format_count(summary.trainable_parameters), summary.trainable_parameters),
        ("held-out loss before", format_decimal(summary.eval_loss_before), summary.eval_loss_before),
        ("held-out loss after", format_decimal(summary.eval_loss), summary.eval_loss),
        ("training loss, mean", format_decimal(summary.train_loss), summary.train_loss),
        ("time", format_duration(summary.seconds), summary.seconds),
        ("speed", f"{format_count(summary.tokens_per_second)} tokens/s", summary.tokens_per_second),
        ("peak memory", format_bytes(summary.peak_memory_bytes), summary.peak_memory_bytes),
    ]
    lines += [f"- {name}: {words}" for name, words, value in rows if value is not None]
    if summary.versions:
        lines.append("- " + ", ".join(f"{name} {version}" for name, version in summary.versions.items() if version))
    return "## Training\n\n" + "\n".join(lines)


def _option(value: object) -> str:
    return " ".join(str(part) for part in value) if isinstance(value, list) else str(value)


def _data_name(path: str) -> str:
    """A hub id as it is, a file or folder without the folders above it."""
    is_hub_id = path.count("/") == 1 and not path.startswith((".", "/", "~")) and "." not in path.rsplit("/")[-1]
    return path if is_hub_id else path.rstrip("/").rsplit("/")[-1]


def _limits(summary: RunSummary) -> str:
    warnings = [*run_warnings(summary), "Nothing in this run measured whether its answers are true or safe."]
    # A token such as <s> would be taken for an HTML tag.
    return "## Limits\n\n" + "\n".join(f"- {escape(warning, quote=False)}" for warning in warnings)
