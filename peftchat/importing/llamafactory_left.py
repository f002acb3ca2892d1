"""LLaMA-Factory's keys that a recipe has no counterpart for: those without a bearing, and those that are refused."""

from peftchat.importing.rules import Table, group, inert, refused
from peftchat.importing.shared_rules import HUB, KERNEL, LAUNCH, LOGGING, NOT_TEXT, PREPARED

_OFF_OR_REFUSED = "concerns a setting that is off or refused"
_LOSS = "another loss than peftchat's mean over answers"
_MEGATRON = "trains by Megatron; peftchat trains by transformers, with DDP or ZeRO"

LLAMAFACTORY_LEFT: Table = {
    **group(
        inert(PREPARED),
        "overwrite_cache preprocessing_num_workers preprocessing_batch_size tokenized_path streaming buffer_size "
        "data_shared_file_system ignore_pad_token_for_loss media_dir eval_on_each_dataset max_new_tokens "
        "sample_backend",
    ),
    **group(
        inert(LOGGING),
        "plot_loss compute_accuracy print_param_status include_effective_tokens_per_second eval_num_beams "
        "use_swanlab swanlab_project swanlab_workspace swanlab_run_name swanlab_mode swanlab_api_key swanlab_logdir "
        "swanlab_lark_webhook_url swanlab_lark_secret enable_torch_profiler profiler_output_dir profiler_wait_steps "
        "profiler_warmup_steps profiler_active_steps profiler_repeat profiler_record_shapes "
        "profiler_profile_memory profiler_with_stack profile_modules trackio_project",
    ),
    **group(inert(HUB), "hf_hub_token ms_hub_token om_hub_token"),
    **group(
        inert(LAUNCH),
        "ray_num_workers ray_init_kwargs ray_run_name ray_storage_path resources_per_worker placement_strategy "
        "master_addr master_port device_map quantization_device_map low_cpu_mem_usage offload_folder cache_dir "
        "use_fast_tokenizer fsdp_transformer_layer_cls_to_wrap",
    ),
    **group(inert(KERNEL), "use_unsloth use_unsloth_gc enable_liger_kernel use_v1_kernels use_kv_cache"),
    **group(
        inert("concerns how a finished model answers"),
        "infer_backend infer_dtype predict_with_generate do_predict temperature top_p top_k do_sample num_beams "
        "max_length repetition_penalty length_penalty skip_special_tokens vllm_maxlen vllm_gpu_util "
        "vllm_enforce_eager vllm_max_lora_rank vllm_config sglang_maxlen sglang_mem_fraction sglang_tp_size "
        "sglang_config sglang_lora_backend",
    ),
    **group(
        inert(NOT_TEXT),
        "image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches video_max_pixels video_min_pixels "
        "video_fps video_maxlen use_audio_in_video audio_sampling_rate freeze_vision_tower "
        "freeze_multi_modal_projector freeze_language_model",
    ),
    **group(inert("added tokens begin with the mean of the others"), "resize_vocab init_special_tokens"),
    **group(
        refused("peftchat adds the tokens of the chat template only"),
        "add_tokens add_special_tokens new_special_tokens_config",
    ),
    "split_special_tokens": refused("special tokens in a message are ordinary text: `chat.special_token_text`"),
    "tool_format": refused("tools are written as the template does"),
    "preserve_thinking": refused("`chat.reasoning_history: keep` keeps the reasoning of earlier answers"),
    "additional_target": refused("an adapter trains no whole modules beside it; embeddings of added tokens alone"),
    "loraplus_lr_embedding": inert("only embeddings of added tokens are trained beside the adapter"),
    "create_new_adapter": inert("every run trains a new adapter"),
    "adapter_folder": inert(_OFF_OR_REFUSED),
    **group(
        refused("an optimizer that peftchat does not have; see `training.optim`"),
        "use_galore use_apollo use_badam use_adam_mini use_muon",
    ),
    **group(
        inert(_OFF_OR_REFUSED),
        "galore_target galore_rank galore_update_interval galore_scale galore_proj_type galore_layerwise "
        "apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj apollo_proj_type "
        "apollo_scale_type apollo_layerwise apollo_scale_front badam_mode badam_start_block badam_switch_mode "
        "badam_switch_interval badam_update_ratio badam_mask_mode badam_verbose asft_alpha eaft_alpha "
        "fp8_backend fp8_enable_fsdp_float8_all_gather kt_cpu_activation kt_weight_path kt_non_expert_weight_path "
        "kt_expert_checkpoint_path kt_use_lora_experts kt_lora_expert_num kt_lora_expert_intermediate_size kt_config "
        "hyper_parallel_args hyper_parallel_cp_size ref_model_adapters ref_model_quantization_bit "
        "reward_model_adapters reward_model_quantization_bit reward_model_type ppo_buffer_size ppo_epochs "
        "ppo_score_norm ppo_target ppo_whiten_rewards freeze_trainable_layers freeze_trainable_modules "
        "freeze_extra_modules oft_rank",
    ),
    **group(refused(_LOSS), "use_dft_loss use_asft_loss use_eaft_loss pref_bco_weight ld_alpha"),
    "moe_aux_loss_coef": refused("peftchat adds no loss of routers"),
    **group(
        refused("another computation of the model"),
        "shift_attn mixture_of_depths rope_scaling upcast_layernorm upcast_lmhead_output use_llama_pro",
    ),
    "train_from_scratch": refused("peftchat tunes trained weights and begins no new ones", blocks=True),
    "fp8": refused("other numbers in training; peftchat trains in 16 or 32 bits"),
    **group(
        refused("experts in the CPU's memory by KTransformers; `distributed.offload` moves weights there under ZeRO"),
        "use_kt",
    ),
    **group(refused("give the reference as the base: it is the base with the adapter switched off"), "ref_model"),
    "reward_model": refused("learns from rewards; peftchat learns from answers and pairs", blocks=True),
    **group(refused(_MEGATRON, blocks=True), "use_mca use_megatron_bridge use_hyper_parallel"),
    **group(
        refused(_MEGATRON, blocks=True, unless=()),
        "tensor_model_parallel_size sequence_parallel pipeline_model_parallel_size use_distributed_optimizer "
        "bias_activation_fusion apply_rope_fusion overlap_param_gather overlap_grad_reduce "
        "expert_model_parallel_size moe_grouped_gemm moe_token_dispatcher_type recompute_granularity "
        "context_parallel_size use_packed_sequences export_hf_on_finish megatron_bridge_args",
    ),
    **group(
        inert("`peftchat merge` and `peftchat export` write merged models"),
        "export_dir export_size export_device export_quantization_bit export_quantization_dataset "
        "export_quantization_nsamples export_quantization_maxlen export_legacy_format export_hub_model_id",
    ),
}
"""What becomes of LLaMA-Factory's other keys."""
