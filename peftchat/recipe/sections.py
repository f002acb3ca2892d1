"""The sections of a recipe except `adapter` and `training`, and the values their keys accept."""

import re
from datetime import date
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from peftchat.chat_template.loss_mask import LossOn, LossPolicy
from peftchat.chat_template.template_settings import (
    ReasoningFormat,
    ReasoningHistory,
    TemplateSettings,
    UnsupportedRoles,
)
from peftchat.chat_template.templates import CHAT_TEMPLATES, TOKENIZER_TEMPLATE, is_template_name, template_summaries
from peftchat.conversation import RankPairs, Role
from peftchat.strict_model import StrictModel, list_to_tuple


def _check_layer_ranges(layers: str) -> str:
    """Refuse a range that ends before it begins, which would name no layer."""
    for first, last in re.findall(r"(\d+)-(\d+)", layers):
        if int(last) < int(first):
            raise PydanticCustomError("layers", "a range must not end before it begins")
    return layers


Method = Literal["full", "lora", "qlora"]
Dtype = Literal["bfloat16", "float16", "float32"]
ComputeDtype = Literal["auto", "bfloat16", "float32"]
MasterWeights = Literal["float32", "bfloat16"]
Attention = Literal["auto", "varlen", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"]

QuantizationType = Literal["nf4", "fp4"]

NewTokenInit = Literal["mean", "description", "zeros"]
SpecialTokenText = Literal["escape", "error"]
UntrainableExamples = Literal["drop", "error"]

Truncation = Literal["turns", "drop_first_turns", "split", "error", "drop"]

Strategy = Literal["auto", "single", "ddp", "zero2", "zero3"]
Offload = Literal["none", "optimizer", "all"]

SaveStrategy = Literal["no", "steps", "epoch"]
EvalStrategy = Literal["no", "steps", "epoch"]
BestMetric = Literal["eval_loss", "eval_accuracy"]

Reporter = Literal["tensorboard", "wandb", "trackio", "mlflow"]
REPORTERS: tuple[str, ...] = get_args(Reporter)

Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "warmup_stable_decay",
]

# Only optimizers that run with what peftchat installs and need no further key: GaLore, APOLLO and LOMO want
# a list of modules, the schedule-free ones a package of their own.
Optimizer = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "ademamix",
    "ademamix_8bit",
    "paged_ademamix_8bit",
    "paged_ademamix_32bit",
    "lion_8bit",
    "lion_32bit",
    "paged_lion_8bit",
    "paged_lion_32bit",
    "adafactor",
    "adagrad",
    "rmsprop",
    "sgd",
]


class ModelSection(StrictModel):
    """The base model and how it is loaded."""

    name: str = Field(
        min_length=1,
        description="The base model: a folder with a transformers model, or a hub id.",
        examples=["HuggingFaceTB/SmolLM2-135M"],
    )
    adapter: str | None = Field(
        None,
        min_length=1,
        description="A finished run to begin at, such as one of `sft`: its base, adapter and chat template are taken. "
        "The adapter goes on; `method: full` merges it in memory first (docs/preferences.md).",
    )
    revision: str | None = Field(
        None, description="Branch, tag or commit of a hub model. Without it the hub's main branch is taken."
    )
    dtype: Dtype = Field(
        "bfloat16",
        description="Dtype of weights and computation. There is no separate `bf16` or `fp16`.",
    )
    compute_dtype: ComputeDtype = Field(
        "auto",
        description="What training computes in. `auto` takes `dtype`, or float32 on a CPU whose products of two "
        "bfloat16 matrices are slower (most without AVX-512), if memory suffices. The model is saved in `dtype`.",
    )
    attention: Attention = Field(
        "auto",
        description="The attention implementation. `auto` takes the fastest one here that keeps packed conversations "
        "apart: `flash_attention_2` where it is installed, else `varlen` (torch's variable-length kernel on a "
        "GPU, conversation by conversation on a CPU), else `sdpa` with a mask.",
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with a hub model. Only for authors you trust."
    )
    freeze_layers: (
        Annotated[str, Field(pattern=r"^\d+(-\d+)?(,\d+(-\d+)?)*$"), AfterValidator(_check_layer_ranges)] | None
    ) = Field(
        None,
        description="Decoder layers that `method: full` leaves as they are, from 0 on: `0-11`, or `0-3,8`.",
        examples=["0-11"],
    )

    @property
    def computed_in(self) -> Dtype:
        """The dtype that training computes in."""
        return self.dtype if self.compute_dtype == "auto" else self.compute_dtype

    @property
    def loaded_as(self) -> Dtype:
        """The dtype of unquantized frozen weights in memory: the wider of the two."""
        return "float32" if self.computed_in == "float32" else self.dtype


class QuantizationSection(StrictModel):
    """How the frozen base is quantized with bitsandbytes (method `qlora`)."""

    bits: Literal[4, 8] = Field(4, description="Bits per weight of the frozen base.")
    type: QuantizationType = Field("nf4", description="The 4-bit dtype. `nf4` suits trained weights better.")
    double: bool = Field(
        True,
        description="Quantize the scales of 4-bit weights too, which saves about 0.4 bits per weight.",
    )


def _check_template_name(name: str) -> str:
    if not is_template_name(name):
        expected = " or ".join(f"'{known}'" for known in (*CHAT_TEMPLATES, TOKENIZER_TEMPLATE, "a .jinja file"))
        raise PydanticCustomError("literal_error", "expected {expected}", {"expected": expected})
    return name


TemplateName = Annotated[str, AfterValidator(_check_template_name)]
"""A value of `chat.template`."""


def _check_date(text: str) -> str:
    """Refuse a date of the right form that no calendar has."""
    try:
        date.fromisoformat(text)
    except ValueError as error:
        raise PydanticCustomError("date", "is no date ({why})", {"why": str(error)}) from error
    return text


class ChatSection(StrictModel):
    """How a conversation is encoded, and which tokens are trained."""

    template: TemplateName = Field(
        "starchat",
        examples=[*CHAT_TEMPLATES, TOKENIZER_TEMPLATE, "path/to/template.jinja"],
        description="The chat template. Special tokens that the tokenizer lacks are added. "
        + " ".join(f"`{name}`: {summary}" for name, summary in template_summaries().items()),
    )
    system: str | None = Field(
        None,
        description="System message for conversations that bring none. `null` writes no system block, an empty "
        "text an empty one.",
    )
    template_kwargs: dict[str, Any] = Field(
        {},
        description="Variables of the template, for `model` and a template of your own: `{enable_thinking: false}`.",
    )
    template_date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$"), AfterValidator(_check_date)] | None = Field(
        None,
        examples=["2026-01-31"],
        description="The date for templates that write the current one. `null` takes today's.",
    )
    end_token: str | None = Field(
        None,
        min_length=1,
        description="The special token that ends an answer, for a template that writes none behind it.",
    )
    loss_on: LossOn = Field(
        "answers",
        description="What is trained: `answers` (each answer and its end token), `answers_and_headers` "
        "(also the assistant token and line breaks around them), `last_answer`, or "
        "`everything`.",
    )
    train_reasoning: bool = Field(
        True,
        description="Train the reasoning of answers. `false` leaves it in the text as context, under every `loss_on`.",
    )
    train_tool_calls: bool = Field(
        True,
        description="Train the tool calls of answers. `false` leaves them in the text as context. Results of tools and "
        "their definitions are trained by `loss_on: everything` only.",
    )
    train_empty_reasoning: bool = Field(
        True,
        description="Train the marks of an empty reasoning, such as `<think>\\n\\n</think>`, that a template writes "
        "before an answer without reasoning.",
    )
    reasoning_format: ReasoningFormat = Field(
        "template",
        description="Reasoning of answers: where the `template` writes it, or `inline` in front of the content, as "
        "`<think>\\n…\\n</think>\\n\\n`, for a template that has no place for it. The saved template does the same.",
    )
    reasoning_history: ReasoningHistory = Field(
        "template",
        description="Reasoning of earlier answers in the prompts of later ones: as the `template` does, `keep` "
        "(refused where the template leaves it out), or `drop` it before the last user message. The saved template "
        "does the same.",
    )
    unsupported_roles: UnsupportedRoles = Field(
        "error",
        description="System messages and tool results that the template cannot write: an `error`, `merge_into_user` "
        "(into the next user message; calls and definitions become text), or `drop` them, with the calls. Both are "
        "counted. The saved template does the same.",
    )
    new_token_init: NewTokenInit = Field(
        "mean",
        description="Initial embeddings of added tokens: the `mean` of the existing embeddings, the mean of "
        "the words of a `description` of the token, or `zeros`.",
    )
    special_token_text: SpecialTokenText = Field(
        "escape",
        description="What to do with a message that contains the text of a special token: `escape` encodes it as "
        "ordinary text, `error` stops.",
    )
    untrainable_examples: UntrainableExamples = Field(
        "drop",
        description="What to do with an example in which no token is trained: `drop` it and count it, or stop with an "
        "`error`.",
    )

    @property
    def template_settings(self) -> TemplateSettings:
        """What is written into the template."""
        return TemplateSettings(
            self.template_kwargs, self.end_token, self.reasoning_history, self.unsupported_roles, self.reasoning_format
        )

    @property
    def loss_policy(self) -> LossPolicy:
        """What is trained of a conversation."""
        return LossPolicy(self.loss_on, self.train_reasoning, self.train_tool_calls, self.train_empty_reasoning)


ColumnName = Literal[
    "prompt",
    "completion",
    "system",
    "context",
    "history",
    "messages",
    "role",
    "content",
    "tools",
    "tool_calls",
    "reasoning_content",
    "train",
    "chosen",
    "rejected",
    "lang",
]


class DataEntry(StrictModel):
    """One source of conversations."""

    path: str = Field(
        min_length=1,
        description="A local file, a folder, a pattern such as `data/*.jsonl`, or the hub id of a dataset.",
        examples=["conversations.jsonl"],
    )
    format: str = Field(
        "auto",
        min_length=1,
        description="The format of the records. `auto` detects it from the first ones and reports it.",
    )
    split: str | None = Field(None, min_length=1, description="Split of a folder or hub dataset, such as `train`.")
    subset: str | None = Field(
        None, min_length=1, description="Subset of a hub dataset that has several (`datasets` calls it `name`)."
    )
    revision: str | None = Field(
        None, min_length=1, description="Branch, tag or commit of a hub dataset. The commit that was read is recorded."
    )
    weight: float = Field(
        1.0, gt=0, description="How often each conversation of this source is used: 2 is twice, 0.5 is half of them."
    )
    languages: Annotated[tuple[str, ...], BeforeValidator(list_to_tuple)] = Field(
        (),
        description="Keep only conversations in these languages, such as `[en, German]`; `pt` includes `pt-BR`. The "
        "record's own `lang` decides where there is one, else a detector.",
    )
    oasst_top_k: int | None = Field(
        None,
        ge=1,
        description="OpenAssistant exports only: follow the best N ranked replies of each turn. Without it, all.",
    )
    oasst_pairs: RankPairs | None = Field(
        None,
        description="OpenAssistant exports only, for objectives with pairs: which ranked replies to one prompt are "
        "compared. The best and the worst (`best_worst`, the default), each and the next (`adjacent`), or `all` of "
        "them. With `oasst_top_k`, chosen replies are among the best N.",
    )
    columns: dict[ColumnName, str] = Field(
        {},
        description="Names of this source's fields, such as `{prompt: question, completion: answer}` or `{messages: "
        "talk, role: who, content: says}`. Formats know the usual names by themselves.",
    )
    roles: dict[str, Role] = Field(
        {},
        description="Names of this source's roles, such as `{customer: user, agent: assistant}`. The usual ones are "
        "known.",
    )


Consecutive = Literal["error", "merge", "keep"]
Entries = Annotated[tuple[DataEntry, ...], BeforeValidator(list_to_tuple), Field(min_length=1)]


class DataSection(StrictModel):
    """The conversations for training and evaluation."""

    train: Entries = Field(
        description="The sources trained on; several are mixed by weight.",
        examples=["[{path: conversations.jsonl}]"],
    )
    resample: bool = Field(
        False,
        description="Draw the shares of the sources again in each epoch: with `weight: 0.5` another half, until every "
        "example had its turn. Needs a weight that is no whole number.",
    )
    eval: Entries | None = Field(
        None,
        description="Held-out sources. Give these or `eval_fraction`, not both; with neither nothing is evaluated.",
    )
    eval_fraction: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of the training conversations held out for evaluation, chosen by `training.seed`; "
        "conversations with the same first message stay in one split.",
    )
    max_length: int = Field(2048, ge=2, description="Most tokens in an example, and in a pack when `packing` is on.")
    packing: bool = Field(
        True,
        description="Put several conversations in one pack of `max_length` tokens instead of padding. Conversations "
        "in a pack do not attend to each other.",
    )
    truncation: Truncation = Field(
        "turns",
        description="A conversation longer than `max_length`: `turns` drops its last turns, `drop_first_turns` its "
        "first ones, `split` makes several examples of it, each with the system message; `drop` drops the "
        "conversation, `error` stops. All are counted.",
    )
    consecutive: Consecutive = Field(
        "error",
        description="Two turns of one role in a row, or a system message behind other turns: `error` refuses the "
        "record, `merge` joins neighbors with a line break and counts them, `keep` leaves them to the template. "
        "Without it: `keep` for `chat.template: model` and a template of your own, otherwise `error`.",
    )
    pad_to_multiple_of: int | None = Field(
        None,
        ge=1,
        description="Pad to a multiple of this many tokens, which is faster on some accelerators (8 or 64).",
    )
    max_train_samples: int | None = Field(None, ge=1, description="Use only the first N training conversations.")
    max_eval_samples: int | None = Field(None, ge=1, description="Use only the first N held-out conversations.")

    @property
    def has_eval(self) -> bool:
        """Whether there are held-out conversations."""
        return self.eval is not None or self.eval_fraction is not None


def _questions(value: object) -> object:
    """Return a list of questions or the name of a file; pydantic would tell what is wrong with both forms at once."""
    is_list = isinstance(value, list | tuple) and all(isinstance(one, str) and one for one in value)
    if value is None or (value and (isinstance(value, str) or is_list)):
        return value
    raise PydanticCustomError("questions", "expected a list of questions as texts, or the name of a file")


def _task_names(value: object) -> object:
    """Return the names of a list, or of a text with commas as on the command line; none for `none`."""
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise PydanticCustomError("tasks", "expected a list of tasks, such as `[arc_easy@5, hellaswag]`")
    names = tuple(name.strip() for name in names)
    if names == ("none",):
        return ()
    wrong = next((name for name in names if not re.fullmatch(r"[^@,\s]+(@\d+)?", name)), None)
    if wrong is not None:
        what = "{name} is not the name of a task; expected `NAME` or `NAME@SHOTS`"
        raise PydanticCustomError("tasks", what, {"name": repr(wrong)})
    return names


class EvaluationSection(StrictModel):
    """What is looked at beside the held-out loss."""

    questions: Annotated[list[str] | str | None, BeforeValidator(_questions)] = Field(
        None,
        description="Questions that the model answers, greedily, before and after training and at each evaluation. A "
        "list, or a file with one a line; lines of a `.jsonl` file are texts or objects with `prompt`. The answers are "
        "in `samples.jsonl` and on the report page.",
        examples=["[How do I read a file?]"],
    )
    max_new_tokens: int = Field(120, ge=1, description="Most tokens of such an answer.")
    tasks: Annotated[tuple[str, ...], BeforeValidator(_task_names)] = Field(
        (),
        description="Tasks of EleutherAI's harness that the run and its base are asked after training, named as for "
        "`peftchat evaluate --tasks`. They and their data are checked before training. Needs the extra `evaluate`.",
        examples=["[arc_easy@5, hellaswag]"],
    )
    include: str | None = Field(None, min_length=1, description="A folder with task files of your own.")
    limit: int | None = Field(None, ge=1, description="Most questions of each task.")
    chat_template: bool = Field(False, description="Ask the tasks through the model's chat template.")


class DistributedSection(StrictModel):
    """The processes of a run, and how they shard the model."""

    strategy: Strategy = Field(
        "auto",
        description="`single` process, `ddp` (a full model on each), `zero2` (gradients and optimizer "
        "sharded) or `zero3` (weights sharded too). `auto` is `single` for one process; for "
        "more, `zero3` for `full` and `ddp` for adapters.",
    )
    processes: int | None = Field(
        None, ge=1, description="Processes on each node. Without it: one for each GPU, or one on a CPU."
    )
    nodes: int = Field(1, ge=1, description="Machines that take part; start the same command on each of them.")
    offload: Offload = Field(
        "none",
        description="Keep the optimizer's state (`optimizer`) or weights as well (`all`, `zero3` only) in "
        "CPU memory. Slower, but fits larger models.",
    )
    deepspeed_config: str | None = Field(
        None,
        min_length=1,
        description="Your own DeepSpeed JSON file, instead of the one made for `strategy`. It must not hold "
        "a scheduler, nor contradict the recipe.",
    )
