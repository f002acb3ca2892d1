"""Python code that loads a run with stock transformers and peft, as text for its model card."""

from pathlib import Path

from peftchat.recipe import QuantizationSection, Recipe
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
    lines = _full(recipe) if recipe.method == "full" else _adapter(recipe, facts)
    return "\n".join(lines) + "\n" + _ASK


def new_vocabulary_size(facts: RunSummary) -> int | None:
    """Rows that the base's embeddings must have for the new tokens; `None` if they are known to have them."""
    if not facts.new_tokens:
        return None
    needed = max(token.id for token in facts.new_tokens) + 1
    if facts.base_vocabulary_size is not None and needed <= facts.base_vocabulary_size:
        return None
    return needed


def _full(recipe: Recipe) -> list[str]:
    arguments = "".join(f", {argument}" for argument in _trust(recipe))
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig",
        "",
        f'run = "{run_name(recipe)}"  # this folder',
        f"tokenizer = AutoTokenizer.from_pretrained(run{arguments})",
        "generation = GenerationConfig.from_pretrained(run)  # it stops at the end of the answer",
        f'model = AutoModelForCausalLM.from_pretrained(run, dtype="{recipe.model.dtype}"{arguments})',
    ]


def _adapter(recipe: Recipe, facts: RunSummary) -> list[str]:
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
        lines += _quantization(recipe)
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


def _quantization(recipe: Recipe) -> list[str]:
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
