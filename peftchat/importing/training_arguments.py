"""The keys of transformers' TrainingArguments, which TRL and LLaMA-Factory take as they are."""

from peftchat.importing.draft import IS_OFF, Draft, SourceLine, as_bool, as_number
from peftchat.importing.rules import Rule, Table, by, group, inert, refused, same, whole, words
from peftchat.importing.shared_rules import (
    HUB,
    KERNEL,
    LAUNCH,
    LOGGING,
    NO_OPTIMIZER,
    NO_SCHEDULE,
    OPTIMIZER_WHY,
    OPTIMIZERS,
    PREPARED,
    RESUME,
    RUN_FOLDER,
    SCHEDULES,
    checkpointing,
    deepspeed,
    fsdp,
    fsdp_offload,
    trackers,
)

_NAMES = (
    "learning_rate max_steps num_train_epochs per_device_train_batch_size per_device_eval_batch_size "
    "gradient_accumulation_steps weight_decay max_grad_norm adam_beta1 adam_beta2 adam_epsilon optim_args seed "
    "data_seed save_total_limit eval_on_start load_best_model_at_end logging_steps run_name dataloader_num_workers "
    "torch_compile metric_for_best_model"
)
"""Keys that mean the same in a recipe's section `training`."""


def _warmup(draft: Draft, line: SourceLine) -> None:
    """Take the warm-up: a number of steps wins over a share, as in transformers."""
    steps = as_number(draft.get("warmup_steps"))
    if line.key == "warmup_ratio" and steps:
        draft.leave(line, "`warmup_steps` is given too and wins")
    elif line.key == "warmup_steps" and not steps and draft.get("warmup_ratio"):
        draft.leave(line, "0, so that `warmup_ratio` holds")
    else:
        draft.keep(line, "training.warmup_steps", line.value)


def _every(kind: str) -> Rule:
    def act(draft: Draft, line: SourceLine) -> None:
        steps = as_number(line.value)
        if isinstance(steps, float) and 0 < steps < 1:
            why = "a share of all steps, which are not known here; give steps to have it more often"
            draft.change(line, {f"training.{kind}_strategy": "epoch"}, f"once an epoch: {why}")
        else:
            draft.keep(line, f"training.{kind}_steps", line.value)

    return by(act)


def _batch_per_gpu(draft: Draft, line: SourceLine) -> None:
    kind = "train" if "train" in line.key else "eval"
    draft.keep(line, f"training.per_device_{kind}_batch_size", line.value)


def _deterministic(draft: Draft, line: SourceLine) -> None:
    if as_bool(line.value) is True:
        draft.leave(line, "runs on the same machine and versions repeat by themselves")
    else:
        draft.leave(line, IS_OFF)


STRATEGIES = {"no": "no", False: "no", "steps": "steps", "epoch": "epoch"}

TRAINING_ARGUMENTS: Table = {
    **{name: same(f"training.{name}") for name in _NAMES.split()},
    "output_dir": same("output_dir"),
    "warmup_steps": by(_warmup),
    "warmup_ratio": by(_warmup),
    "lr_scheduler_type": words("training.lr_scheduler_type", SCHEDULES, "", otherwise=NO_SCHEDULE),
    "lr_scheduler_kwargs": whole(lambda draft, line: draft.keep(line, "training.lr_scheduler_kwargs", line.value)),
    "optim": words("training.optim", OPTIMIZERS, OPTIMIZER_WHY, otherwise=NO_OPTIMIZER),
    "gradient_checkpointing": checkpointing(),
    "gradient_checkpointing_kwargs": whole(
        lambda draft, line: draft.keep(line, "training.gradient_checkpointing_kwargs", line.value)
    ),
    "save_strategy": words("training.save_strategy", STRATEGIES, "", otherwise="is not a strategy here"),
    "eval_strategy": words("training.eval_strategy", STRATEGIES, "", otherwise="is not a strategy here"),
    "evaluation_strategy": words("training.eval_strategy", STRATEGIES, "", otherwise="is not a strategy here"),
    "save_steps": _every("save"),
    "eval_steps": _every("eval"),
    **group(by(_batch_per_gpu), "per_gpu_train_batch_size per_gpu_eval_batch_size"),
    "report_to": trackers(),
    "deepspeed": deepspeed(),
    "fsdp": fsdp(),
    "fsdp_config": inert("ZeRO needs no such settings"),
    **group(fsdp_offload(), "fsdp_config.offload_params fsdp_config.fsdp_offload_params"),
    "full_determinism": by(_deterministic),
    "label_smoothing_factor": refused("peftchat's loss smooths no labels"),
    "neftune_noise_alpha": refused("peftchat adds no noise to embeddings"),
    "auto_find_batch_size": inert("`training.on_oom: halve` does a step again in smaller parts instead"),
    "optim_target_modules": refused("the optimizers that need it are not offered"),
    **group(inert(RESUME), "resume_from_checkpoint restore_callback_states_from_checkpoint ignore_data_skip"),
    **group(
        inert("`peftchat train` always trains, and evaluates where `data` holds examples out"),
        "do_train do_eval overwrite_output_dir",
    ),
    **group(
        inert(HUB),
        "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision",
    ),
    **group(
        inert(RUN_FOLDER), "save_only_model save_on_each_node save_safetensors enable_jit_checkpoint greater_is_better"
    ),
    **group(
        inert(LOGGING),
        "logging_strategy logging_first_step logging_dir log_on_each_node logging_nan_inf_filter log_level "
        "log_level_replica disable_tqdm include_num_input_tokens_seen include_tokens_per_second skip_memory_metrics "
        "debug project trackio_space_id trackio_bucket_id trackio_static_space_id include_for_metrics",
    ),
    **group(
        inert(PREPARED),
        "dataloader_drop_last dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
        "dataloader_multiprocessing_context dataloader_in_order remove_unused_columns label_names group_by_length "
        "length_column_name train_sampling_strategy",
    ),
    **group(
        inert(LAUNCH),
        "accelerator_config local_rank ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers "
        "ddp_static_graph ddp_backend ddp_timeout use_cpu no_cuda",
    ),
    **group(
        inert("evaluation here is the mean loss per token of the held-out examples"),
        "eval_delay prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps "
        "batch_eval_metrics bf16_full_eval fp16_full_eval",
    ),
    **group(
        inert(KERNEL),
        "tf32 torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config torch_empty_cache_steps",
    ),
    **group(same("distributed.processes"), "num_processes nproc_per_node"),
    **group(same("distributed.nodes"), "num_machines nnodes"),
    **group(
        inert(LAUNCH),
        "machine_rank main_process_port main_process_ip mixed_precision node_rank master_addr master_port rdzv_backend "
        "rdzv_endpoint rdzv_id multi_gpu standalone include",
    ),
    "use_cache": inert("training never uses the cache of generation"),
    "average_tokens_across_devices": inert("always so: the loss is the mean over the tokens of a step"),
    "parallelism_config": refused("peftchat has no parallelism within a model except ZeRO's"),
}
"""What becomes of each key of TrainingArguments."""


def assume_training_arguments(draft: Draft, *, learning_rate: float) -> None:
    """Write down the defaults of TrainingArguments where they differ from peftchat's.

    Args:
        draft: is written to.
        learning_rate: the rate of the trainer, which may be another one than transformers'.
    """
    because = "transformers' default"
    draft.assume("training.learning_rate", learning_rate, f"{draft.tool}'s default")
    draft.assume("training.per_device_train_batch_size", 8, because)
    draft.assume("training.gradient_accumulation_steps", 1, because)
    draft.assume("training.lr_scheduler_type", "linear", because)
    draft.assume("training.warmup_steps", 0, f"{because}: no warm-up")
    holds_out = any(key.startswith("data.eval") for key in draft.values)
    if holds_out and draft.values.get("training.eval_steps") is None:
        draft.assume("training.eval_strategy", "no", because)
