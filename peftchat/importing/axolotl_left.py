"""Axolotl's keys that a recipe has no counterpart for: those without a bearing, and those that are refused."""

from peftchat.importing.rules import Table, group, inert, refused
from peftchat.importing.shared_rules import (
    HUB,
    KERNEL,
    LAUNCH,
    LOGGING,
    NOT_TEXT,
    PARALLEL,
    PREPARED,
    RESUME,
    RUN_FOLDER,
)

_REWARDS = "learns from rewards; peftchat learns from answers and pairs"
_FROM_CONFIG = "the model's own files say this"

_ONE = (None, False, 0, 1, "", 0.0)

AXOLOTL_LEFT: Table = {
    **group(
        inert(KERNEL),
        "liger_rms_norm liger_glu_activation liger_layer_norm liger_rope liger_fused_linear_cross_entropy "
        "liger_cross_entropy liger_rms_norm_gated liger_use_token_scaling cut_cross_entropy lora_mlp_kernel "
        "lora_qkv_kernel lora_o_kernel "
        "lora_embedding_kernel use_kernels use_scattermoe use_sonicmoe experts_implementation fused_attn_kernel "
        "flash_attn_cross_entropy flash_attn_fuse_mlp flash_attn_rms_norm flash_attn_fuse_qkv flash_optimum tf32 "
        "torch_compile_backend torch_compile_mode torch_compile_options flex_attn_compile_kwargs "
        "gemma4_hybrid_attn_impl chunked_cross_entropy chunked_cross_entropy_num_chunks tiled_mlp "
        "tiled_mlp_num_shards tiled_mlp_use_original_mlp large_head_attention flash_attn_d512 sdpa_varlen "
        "llama4_linearized_experts use_dsv4_kernels use_glm_dsa_kernels dsv4_fp4_grouped_mode torchdistx_path "
        "activation_offloading layer_offloading selective_checkpointing gc_steps gc_collect_steps "
        "torch_empty_cache_steps pretrain_multipack_attn fp32_norms fp32_norm_classes",
    ),
    **group(
        inert(PREPARED),
        "dataset_prepared_path dataset_processes dataset_num_proc dataset_keep_in_memory dataloader_pin_memory "
        "dataloader_prefetch_factor dataloader_drop_last remove_unused_columns pad_to_sequence_len "
        "eval_sample_packing sample_packing_group_size sample_packing_bin_size sample_packing_sequentially "
        "sample_packing_mp_start_method sample_packing_eff_est sample_packing_seq_len_multiplier "
        "group_by_length skip_prepare_dataset num_dataset_shards_to_save multipack_real_batches batch_flattening "
        "total_num_tokens total_supervised_tokens is_preprocess preprocess_iterable streaming "
        "streaming_multipack_buffer_size shuffle_before_merging_datasets max_packed_sequence_len eval_sequence_len "
        "dataset_shard_num dataset_shard_idx pretrain_multipack_buffer_size",
    ),
    **group(
        inert(LAUNCH),
        "accelerator_config device device_map world_size local_rank ddp ddp_timeout ddp_bucket_cap_mb "
        "ddp_broadcast_buffers ddp_find_unused_parameters fsdp_version fsdp_final_state_dict_type max_memory "
        "gpu_memory_limit low_cpu_mem_usage lora_on_cpu qlora_sharded_model_loading use_ray ray_num_workers "
        "ray_run_name resources_per_worker experimental_skip_move_to_device dp_shard_size dp_replicate_size "
        "deepcompile provider project_name secrets gpu gpu_count node_count branch dockerfile_commands memory "
        "timeout memory_preprocess timeout_preprocess volumes image env",
    ),
    **group(
        inert(LOGGING),
        "wandb_entity wandb_watch wandb_log_model wandb_run_id wandb_mode mlflow_experiment_name "
        "hf_mlflow_log_artifacts use_comet comet_api_key comet_workspace comet_project_name comet_experiment_key "
        "comet_mode comet_online comet_experiment_config use_swanlab swanlab_project swanlab_experiment_name "
        "swanlab_description swanlab_mode swanlab_workspace swanlab_log_model swanlab_log_completions "
        "swanlab_completion_log_interval swanlab_completion_max_buffer trackio_space_id use_otel_metrics "
        "otel_metrics_host otel_metrics_port include_tokens_per_second include_tkps profiler_steps "
        "profiler_steps_start debug strict eval_table_size eval_max_new_tokens generate_samples "
        "num_generation_samples generation_max_new_tokens generation_temperature generation_top_p generation_top_k "
        "generation_prompt_ratio generation_do_sample test_value",
    ),
    **group(inert(RESUME), "resume_from_checkpoint auto_resume_from_checkpoints dynamic_checkpoint"),
    **group(inert(HUB), "hub_model_id hub_strategy hub_revision push_dataset_to_hub push_to_hub"),
    **group(
        inert(RUN_FOLDER),
        "save_safetensors save_only_model save_first_step tokenizer_save_jinja_files merge_lora merge_method "
        "save_compressed greater_is_better",
    ),
    **group(
        inert(_FROM_CONFIG),
        "base_model_config tokenizer_config tokenizer_type tokenizer_use_fast tokenizer_legacy processor_kwargs "
        "is_falcon_derived_model is_llama_derived_model is_mistral_derived_model is_qwen_derived_model "
        "base_model_ignore_patterns hf_use_auth_token lora_fan_in_fan_out peft_autocast_adapter_dtype "
        "peft_ensure_weight_tying cls_model_config torch_dtype full_finetune",
    ),
    "tokenizer_use_mistral_common": inert("the tokenizer that transformers loads writes the same ids"),
    **group(
        inert("padding is never trained"),
        "special_tokens.pad_token tokens.pad_token",
    ),
    **group(
        inert("the template's own end of an answer is trained, and these are the model's own tokens"),
        "special_tokens.bos_token special_tokens.eos_token special_tokens.unk_token eot_tokens tokens.bos_token "
        "tokens.eos_token tokens.unk_token",
    ),
    **group(
        refused("peftchat adds the tokens of the chat template only"),
        "tokens special_tokens.additional_special_tokens added_tokens_overrides",
    ),
    "special_tokens": inert("these are the model's own tokens"),
    "resize_token_embeddings_to_32x": inert("embeddings grow by the added tokens only"),
    **group(
        inert("added tokens begin with the mean of the others; see `chat.new_token_init`"),
        "mean_resizing_embeddings shrink_embeddings embeddings_skip_upcast fix_untrained_tokens",
    ),
    "loss_watchdog_threshold": inert("`training.on_spike` watches the loss by what came before, not by a fixed bound"),
    "loss_watchdog_patience": inert("`training.on_spike` watches the loss by what came before, not by a fixed bound"),
    "auto_find_batch_size": inert("`training.on_oom: halve` does a step again in smaller parts instead"),
    "shuffle_merged_datasets": refused("examples are drawn at random", unless=(True, None)),
    "lora_modules_to_save": refused("an adapter trains no whole modules beside it; embeddings of added tokens alone"),
    "lora_target_parameters": inert("`all-linear` includes the experts of a mixture; the list of modules decides"),
    "quantize_moe_experts": inert("bitsandbytes decides which weights it quantizes"),
    **group(
        refused("adapts some layers only; give `adapter.target_modules` the names of modules"),
        "peft_layers_to_transform peft_layers_pattern peft_layer_replication lora_rank_pattern lora_alpha_pattern "
        "peft_trainable_token_indices",
    ),
    "loraplus_lr_embedding": inert("only embeddings of added tokens are trained beside the adapter"),
    "unfrozen_parameters": refused("trains some weights only; `model.freeze_layers` names layers that stay"),
    "min_sample_len": refused("peftchat leaves out no short examples; take them out of the data"),
    "max_prompt_len": refused("peftchat cuts whole conversations, by `data.max_length`"),
    "dataset_exact_deduplication": refused("`peftchat data prepare` removes duplicates; give its output as the data"),
    "neftune_noise_alpha": refused("peftchat adds no noise to embeddings"),
    "noisy_embedding_alpha": refused("peftchat adds no noise to embeddings"),
    "optim_args": refused("only some optimizers take options; see `training.optim_args`"),
    "optim_target_modules": refused("the optimizers that need it are not offered"),
    **group(refused("groups of weights have one learning rate here"), "embedding_lr embedding_lr_scale lr_groups"),
    **group(
        refused("peftchat has no such schedule", unless=(*_ONE,)),
        "cosine_constant_lr_ratio lr_quadratic_warmup lr_div_factor eta_min jagged_restart_steps "
        "jagged_restart_warmup_steps jagged_restart_anneal_steps one_cycle",
    ),
    **group(
        refused("belongs to an optimizer that peftchat does not have"),
        "adam_epsilon2 adam_beta3 dion_lr dion_momentum dion_rank_fraction dion_rank_multiple_of qgalore_rank "
        "qgalore_update_proj_gap qgalore_scale qgalore_proj_type qgalore_proj_quant qgalore_proj_bits "
        "qgalore_proj_group_size qgalore_cos_threshold qgalore_gamma_proj qgalore_queue_size",
    ),
    **group(
        refused(PARALLEL, unless=_ONE),
        "context_parallel_size sequence_parallel_degree tensor_parallel_size expert_parallel_size",
    ),
    **group(
        inert("concerns a parallelism that peftchat does not have"),
        "heads_k_stride ring_attn_func expert_parallel_num_nvl_bytes expert_parallel_token_capacity",
    ),
    **group(refused("other numbers in training; peftchat trains in 16 or 32 bits"), "fp8 qat nvfp4_merge_aware"),
    "fp8_enable_fsdp_float8_all_gather": inert("concerns `fp8`"),
    "quantization": inert("concerns what is done after training"),
    **group(
        refused("a base in another quantization; peftchat trains on bitsandbytes' 4 or 8 bits", blocks=True),
        "gptq model_quantization_config use_onebitllms",
    ),
    **group(
        inert("concerns a quantization that is off or refused"),
        "gptq_groupsize gptq_model_v1 gptq_disable_exllama model_quantization_config_kwargs",
    ),
    **group(refused("another kind of training", blocks=True), "relora lisa_n_layers diffusion llmcompressor"),
    **group(
        inert("concerns a kind of training that is off or refused"),
        "relora_prune_ratio relora_prune_method relora_cpu_offload lisa_step_interval lisa_layers_attribute",
    ),
    **group(refused("another loss than peftchat's mean over answers"), "use_eaft model_config.output_router_logits"),
    **group(inert("concerns a loss that is off or refused"), "eaft_alpha eaft_k"),
    **group(refused(f"{_REWARDS}", blocks=True), "reward_model process_reward_model ebft trl vllm num_labels"),
    "center_rewards_coefficient": inert("concerns a reward model"),
    "overrides_of_model_config": refused("peftchat takes the model's config as it is"),
    "model_config": refused("peftchat takes the model's config as it is"),
    "rope_scaling": refused("peftchat takes the model's config as it is"),
    "reinit_weights": refused("peftchat tunes trained weights and begins no new ones", blocks=True),
    **group(refused(NOT_TEXT, blocks=True), "processor_type image_size image_resize_algorithm"),
    "freeze_mm_modules": inert(NOT_TEXT),
    **group(
        refused("another handling of long texts", unless=_ONE),
        "use_pose pose_split_on_token_ids pose_max_context_len pose_num_chunks s2_attention scaling_softmax",
    ),
    **group(refused("examples are drawn at random"), "curriculum_sampling pretraining_sample_concatenation"),
    **group(
        inert("evaluation here is the mean loss per token; `evaluation.tasks` asks benchmarks"),
        "do_causal_lm_eval eval_causal_lm_metrics do_bench_eval bench_dataset bench_split",
    ),
    **group(
        refused("concerns a setting of the preference trainer that peftchat does not have"),
        "dpo_use_weighting dpo_loss_weights rpo_alpha dpo_norm_loss",
    ),
    **group(
        inert(KERNEL),
        "dpo_use_liger_kernel dpo_padding_free precompute_ref_log_probs dpo_use_logits_to_keep "
        "dpo_generate_during_eval",
    ),
    "trainer_cls": refused("a trainer of your own", blocks=True),
}
"""What becomes of Axolotl's other keys."""
