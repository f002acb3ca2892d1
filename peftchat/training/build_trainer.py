"""Building a run's trainer: TRL's arguments, the attention, and the trainer of the objective with its callbacks."""

import os
from typing import TYPE_CHECKING

from peftchat.models.source import ModelSource
from peftchat.recipe import training_arguments
from peftchat.training.context import TrainContext
from peftchat.training.distributed import deepspeed_config
from peftchat.training.label_trainer import LabelTrainer
from peftchat.training.learning_rate import ContinuedScheduleCallback
from peftchat.training.model import TrainableModel, select_attention
from peftchat.training.preference_trainer import PreferenceTrainer
from peftchat.training.throughput import BudgetCallback, has_budget
from peftchat.training.trackers import PROJECT, name_projects, shield_trackers
from peftchat.training.trainer import ChatTrainer

if TYPE_CHECKING:
    from trl import SFTConfig

    from peftchat.chat_template.chat_format import ChatFormat
    from peftchat.dataset.collator import BatchLayout
    from peftchat.recipe import Recipe


def sft_config(context: TrainContext) -> "SFTConfig":
    """Return TRL's arguments for the run.

    transformers reads DeepSpeed's configuration from them, so it has to be called before the model is loaded.
    """
    from trl import SFTConfig

    recipe, distributed = context.recipe, context.distributed
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(context.run_folder.tensorboard))
    name_projects(recipe)
    on_cpu = distributed.gpus == 0
    arguments = training_arguments(recipe)
    # TRL turns it on by default.
    arguments.setdefault("gradient_checkpointing", False)
    if recipe.training.gradient_checkpointing:
        arguments.setdefault("gradient_checkpointing_kwargs", {"use_reentrant": False})
    if context.checkpoint is not None:
        # The run was evaluated before its first step.
        arguments["eval_on_start"] = False
    # Trackers would think of a name of their own.
    arguments["run_name"] = recipe.training.run_name or context.run_folder.path.absolute().name
    arguments["report_to"] = arguments.get("report_to") or "none"
    # Older checkpoints are deleted by `keep_newest`, once the new one is complete.
    arguments["save_total_limit"] = None
    return SFTConfig(
        **arguments,
        output_dir=str(context.run_folder.checkpoints),
        bf16=recipe.model.computed_in == "bfloat16",
        fp16=recipe.model.computed_in == "float16",
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and distributed.world_size > 1 else None,
        ddp_find_unused_parameters=False,
        average_tokens_across_devices=True,
        deepspeed=deepspeed_config(
            recipe, distributed, added_token_elements=_added_token_elements(recipe, context.chat)
        ),
        # Examples are encoded, packed and labeled already.
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=False,
        padding_free=False,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=not on_cpu,
        disable_tqdm=True,
        project=PROJECT,
        log_level="error",
    )


def _added_token_elements(recipe: "Recipe", chat: "ChatFormat") -> int:
    """Return the number of elements of the added tokens' embedding, which ZeRO-3 must not shard."""
    if not chat.new_tokens:
        return 0
    config = ModelSource.of_recipe(recipe).config().get_text_config()
    beyond = max(token.id for token in chat.new_tokens) + 1 - int(config.vocab_size)
    return max(len(chat.new_tokens), beyond) * int(config.hidden_size)


def _trainer_class(recipe: "Recipe") -> type[ChatTrainer]:
    """Return the trainer of a recipe's objective."""
    if recipe.has_labels:
        return LabelTrainer
    return PreferenceTrainer if recipe.has_pairs else ChatTrainer


def trainer_of(
    context: TrainContext, model: TrainableModel, config: "SFTConfig", layout: "BatchLayout"
) -> "ChatTrainer":
    """Return the trainer of the recipe's objective for a layout that the model's attention has been selected for."""
    if layout == "padded":
        # Examples of similar length share a batch, so that little of it is padding.
        config.train_sampling_strategy = "group_by_length"
    return _trainer_class(context.recipe)(context, model, config, layout)


def build_trainer(context: TrainContext, model: TrainableModel, config: "SFTConfig") -> "ChatTrainer":
    """Select the attention, and return the trainer of the recipe's objective with its callbacks."""
    trainer = trainer_of(context, model, config, select_attention(context.recipe, model.model, model.causal_model))
    shield_trackers(trainer, context)
    if has_budget(context.recipe.training):
        trainer.add_callback(BudgetCallback(trainer.gather_token_counts, context.recipe.training))
    if context.checkpoint is not None:
        # Behind the budget, which sets the learning rate of a step too.
        trainer.add_callback(ContinuedScheduleCallback(context.checkpoint, context.notes.tell))
    return trainer
