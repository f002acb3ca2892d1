"""The closed sets of words a recipe may use."""

from typing import Literal, get_args

Method = Literal["full", "lora", "qlora"]
Dtype = Literal["bfloat16", "float16", "float32"]
Attention = Literal["auto", "per_dialogue", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"]

QuantizationType = Literal["nf4", "fp4"]

Template = Literal["starchat", "chatml", "model"]
LossOn = Literal["answers", "answers_and_headers", "last_answer", "everything"]
NewTokenInit = Literal["mean", "description", "zeros"]
SpecialText = Literal["text", "refuse"]
EmptyRows = Literal["drop", "refuse"]

Truncation = Literal["turns", "turns_leading", "split", "refuse", "drop"]

Strategy = Literal["auto", "single", "ddp", "zero2", "zero3"]
Offload = Literal["none", "optimizer", "all"]

SaveStrategy = Literal["no", "steps", "epoch"]
EvalStrategy = Literal["no", "steps", "epoch"]

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
