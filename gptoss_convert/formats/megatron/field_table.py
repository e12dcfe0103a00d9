"""Every field of Megatron's configuration: read, refused unless neutral, or harmless.

Made from the dataclasses `TransformerConfig`, `MLATransformerConfig`, `ModelParallelConfig` and
`HeterogeneousTransformerConfig` of megatron-core 0.13 to 0.20 (commit d98e8a64dd), the parameters
of its `GPTModel`, Megatron-LM's arguments of the same versions, and `GPTModelProvider` of
Megatron-Bridge 0.1 to 0.7 (commit 067f987df). Whoever adds a field reads in their sources what it
does to the logits. A test refuses an installed megatron-core with a field that stands nowhere here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

UNSTATED = "unstated"
"""The default of a field without one: where it is absent, nothing says what the model was."""

Dialect = Literal["args", "provider"]
"""Who speaks: Megatron-LM's `args`, or the `model` section of Megatron-Bridge's run_config.yaml."""


@dataclass(frozen=True)
class Field:
    """One field that changes the arithmetic."""

    name: str
    """As run_config.yaml, TransformerConfig or GPTModel spells it."""
    number: str | None = None
    """The number of `Config` that it states."""
    allowed: tuple[Any, ...] = ()
    """For the others: the values with which the model computes what GPT-OSS does."""
    default: Any = UNSTATED
    """What Megatron takes, and therefore what an absent field means."""
    args: tuple[str, ...] = ()
    """Other spellings, of Megatron-LM's arguments."""
    only: Dialect | None = None
    """The one dialect that has this field, if not both."""
    source: str = "TransformerConfig"
    """Where its meaning, and that of None, stands in Megatron's code."""
    released: Any = None
    """The number that all released models share, whatever their size."""
    mistake: tuple[Any, str] | None = None
    """A value that no GPT-OSS has and that trainers are known to state of it, and who does."""


_GPT = "GPTModel; gpt_builders.py, GPTModelProvider.provide"
_YARN = "YarnRotaryEmbedding; argument_utils.py `_apply_yarn_config_from_args` from 0.19 on"
_ROUTER = "moe_utils.py `topk_routing_with_score_function`"
_ARGS = "arguments.py"
_MODELOPT = "post_training/model_builder.py"
_SCALE = "rotary_seq_len_interpolation_factor"
_PROBS = "export_moe_apply_probs_on_input"
_WIDER = (
    "a window of 129 tokens, as Megatron-Bridge up to 0.3.1 and NeMo give every GPT-OSS by "
    "mistake; the released models have 127, 0"
)
_LONGER = (
    "as Megatron-LM's --enable-gpt-oss and NeMo give every GPT-OSS by mistake; the released "
    "models have 4096"
)
_BALANCING = ("none", "aux_loss", "seq_aux_loss", "global_aux_loss")
"""Sinkhorn and quantile balancing, the others, choose other experts."""

NUMBERS: tuple[Field, ...] = (
    Field("num_layers", "num_hidden_layers"),
    Field("num_moe_experts", "num_local_experts", args=("num_experts",)),
    Field("moe_router_topk", "num_experts_per_tok", default=2, released=4),
    Field("hidden_size", "hidden_size"),
    Field("moe_ffn_hidden_size", "intermediate_size", default=None),
    Field("num_attention_heads", "num_attention_heads"),
    Field("num_query_groups", "num_key_value_heads", default=None),
    Field("kv_channels", "head_dim", default=None),
    Field(
        "layernorm_epsilon", "rms_norm_eps", default=1e-05, args=("norm_epsilon",), released=1e-05
    ),
    Field("activation_func_clamp_value", "swiglu_limit", default=None, released=7.0),
    Field("window_size", "sliding_window", default=None, mistake=((128, 0), _WIDER)),
    Field("rotary_base", "rope_theta", default=10000, source=_GPT, released=150000.0),
    Field("yarn_rotary_scaling_factor", "rope_factor", source=_YARN, released=32.0),
    Field(
        "yarn_original_max_position_embeddings",
        "original_max_position_embeddings",
        source=_YARN,
        released=4096,
        mistake=(131072, _LONGER),
    ),
    Field("yarn_beta_fast", "beta_fast", source=_YARN, released=32.0),
    Field("yarn_beta_slow", "beta_slow", source=_YARN, released=1.0),
    Field("yarn_correction_range_round_to_int", "rope_truncate", source=_YARN, released=False),
)
"""Read: the numbers of the model. What None of a size means, `stated.py` knows."""

FIXED: tuple[Field, ...] = (
    # What makes a GPT of Megatron a GPT-OSS.
    Field("position_embedding_type", None, ("yarn",), "learned_absolute", source=_GPT),
    Field("softmax_type", None, ("learnable",), "vanilla"),
    Field("window_attn_skip_freq", None, (2,), None, source="utils.py `is_layer_window_attention`"),
    Field("normalization", None, ("RMSNorm",), "LayerNorm"),
    Field("add_bias_linear", None, (True,), True),
    Field("gated_linear_unit", None, (True,), False, only="provider"),
    Field("activation_func", None, ("quick_gelu",), "gelu", only="provider"),
    Field("quick_geglu", None, (True,), False, only="args", source=_ARGS),
    Field("glu_linear_offset", None, (1.0,), 0.0),
    Field("moe_router_pre_softmax", None, (False,), False, source=_ROUTER),
    Field("moe_router_score_function", None, ("softmax",), "softmax", source=_ROUTER),
    Field(
        "share_embeddings_and_output_weights", None, (False,), True, only="provider", source=_GPT
    ),
    Field("untie_embeddings_and_output_weights", None, (True,), False, only="args", source=_ARGS),
    # Refused unless neutral: attention.
    Field("softmax_scale", None, (None,), None),
    Field("apply_query_key_layer_scaling", None, (False,), False),
    Field("attention_output_gate", None, (False,), False),
    Field("qk_layernorm", None, (False,), False),
    Field("qk_l2_norm", None, (False,), False),
    Field("export_qk_l2_norm", None, (False,), False, only="args", source=_MODELOPT),
    Field("multi_latent_attention", None, (False,), False),
    Field("experimental_attention_variant", None, (None,), None),
    Field("linear_attention_freq", None, (None,), None),
    Field("use_arbitrary_attention_mask", None, (None, False), None, only="provider", source=_GPT),
    # Refused unless neutral: positions.
    Field("rotary_percent", None, (1.0,), 1.0, source=_GPT),
    Field("rotary_interleaved", None, (False,), False),
    Field("no_rope_freq", None, (None, 0), None, source="attention.py"),
    Field("rope_scaling", None, (False, None), False, args=("use_rope_scaling",), source=_GPT),
    Field("seq_len_interpolation_factor", None, (None,), None, (_SCALE,), source=_GPT),
    Field("mrope_section", None, (None,), None),
    Field("yarn_mscale", None, (None, 1.0), None, source=_YARN),
    Field("yarn_mscale_all_dim", None, (None, 0.0), None, source=_YARN),
    # Refused unless neutral: norms, residual stream, embeddings.
    Field("layernorm_zero_centered_gamma", None, (False,), False),
    Field("apply_layernorm_1p", None, (False,), False, only="args", source=_ARGS),
    Field("apply_residual_connection_post_layernorm", None, (False,), False),
    Field("enable_mhc_connections", None, (False,), False),
    Field("use_mup", None, (False,), False),
    # Refused unless neutral: activation, layers of another kind.
    Field("swiglu", None, (False,), False, only="args", source=_ARGS),
    Field("squared_relu", None, (False,), False, only="args", source=_ARGS),
    Field("moe_layer_freq", None, (1,), 1),
    Field("moe_shared_expert_intermediate_size", None, (None, 0), None),
    Field("moe_latent_size", None, (None,), None),
    Field("mtp_num_layers", None, (None, 0), None),
    Field("heterogeneous_block_specs", None, (False,), False),
    Field("heterogeneous_layers_config_path", None, (None, ""), None),
    Field("is_hybrid_model", None, (False,), False),
    Field("hybrid_layer_pattern", None, (None,), None, only="args", source=_ARGS),
    # Refused unless neutral: routing.
    Field("moe_router_topk_scaling_factor", None, (None, 0, 1.0), None, source=_ROUTER),
    Field("moe_router_num_groups", None, (None,), None, source=_ROUTER),
    Field("moe_router_group_topk", None, (None, 0), None, source=_ROUTER),
    Field("moe_router_topk_limited_devices", None, (None,), None),
    Field("moe_router_enable_expert_bias", None, (False,), False, source=_ROUTER),
    Field("moe_router_load_balancing_type", None, _BALANCING, "aux_loss", source="router.py"),
    Field("moe_router_force_load_balancing", None, (False,), False, source="router.py"),
    Field("moe_router_force_biased", None, (None,), None, source="router.py"),
    Field("moe_apply_probs_on_input", None, (False,), False),
    Field(_PROBS, None, (False,), False, only="args", source=_MODELOPT),
    Field("moe_input_jitter_eps", None, (None,), None, source="router.py"),
    Field("moe_expert_capacity_factor", None, (None,), None, source="router.py; negative is None"),
    Field("moe_expert_rank_capacity_factor", None, (None,), None),
    Field("moe_token_dropping", None, (False,), False),
)
"""Refused with any other value than those allowed."""

EXTRA = frozenset(
    ("moe_mlp_glu_interleave_size", "moe_grouped_gemm", "ffn_hidden_size", "vocab_size")
)
"""Fields that are read besides: the rows of fc1 and of the vocabulary, what None falls back to."""

_HARMLESS = """
activation_func_fp8_input_store apply_rope_fusion attention_backend attention_softmax_in_fp32
autocast_dtype batch_invariant_backend batch_invariant_mode bf16 bias_activation_fusion
bias_dropout_fusion dense_grouped_gemm deterministic_mode disable_bf16_reduced_precision_matmul
enable_autocast first_last_layers_bf16 flash_attention_version flash_decode fp16
fp32_residual_connection fp4 fp4_param fp4_quantizer_factory fp4_recipe fp8 fp8_amax_compute_algo
fp8_amax_history_len fp8_dot_product_attention fp8_interval fp8_margin fp8_multi_head_attention
fp8_output_proj fp8_param fp8_quantizer_factory fp8_recipe fp8_wgrad fused_residual_rmsnorm
fused_single_qkv_rope gradient_accumulation_fusion kitchen_attention_backend logit_dtype
masked_softmax_fusion memory_efficient_layer_norm moe_combine_bwd_dtype moe_dispatch_fwd_dtype
moe_permute_fusion moe_permute_fusion_into_hybridep moe_router_dtype moe_router_fusion
moe_router_padding_for_fp8 moe_router_padding_for_quantization num_layers_at_end_in_bf16
num_layers_at_start_in_bf16 params_dtype persist_layer_norm pipeline_dtype quant_recipe
tp_only_amax_red transformer_impl transformer_layer_spec use_fused_weighted_squared_relu use_kitchen
use_kitchen_attention use_te_activation_func use_transformer_engine_full_layer_spec
use_transformer_engine_op_fuser

attention_dropout barrier_with_L1_time calculate_per_token_loss config_logger_dir
cross_entropy_fusion_impl cross_entropy_loss_fusion embedding_init_method embedding_init_method_std
experimental_attention_variant_loss_scale_func finalize_model_grads_func fp16_lm_cross_entropy
grad_scale_func grad_sync_func hidden_dropout init_method init_method_std
init_model_with_meta_device log_max_attention_logit moe_aux_loss_coeff moe_enable_routing_replay
moe_grad_scale_func moe_per_layer_logging moe_router_bias_update_rate
moe_router_quantile_balancing_ema moe_z_loss_coeff mtp_detach_heads mtp_grad_scale_func
mtp_loss_scaling_factor no_sync_func output_layer_init_method param_sync_func perform_initialization
qk_clip qk_clip_alpha qk_clip_threshold test_mode timers use_cpu_initialization

account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
async_tensor_model_parallel_allreduce batch_p2p_comm batch_p2p_sync
clone_scatter_output_in_embedding context_parallel_size cp_comm_type deallocate_pipeline_outputs
defer_embedding_wgrad_compute delay_wgrad_compute ep_overlap_early_attn_memory_release
expert_gtp_weight_remat_size expert_model_parallel_size expert_tensor_parallel_num_weight_shards
expert_tensor_parallel_size gtp_remat_opt_in_modules gtp_weight_remat_size
hierarchical_context_parallel_sizes high_priority_a2a_comm_stream hybrid_context_parallel
max_seqlen_per_dp_cp_rank microbatch_group_size_per_vp_stage moe_deepep_num_sms moe_enable_deepep
moe_extended_tp moe_flex_dispatcher_backend moe_flex_dispatcher_num_sms
moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms
moe_hybridep_num_sms_preprocessing moe_hybridep_pad_uneven_dispatch_inputs moe_ncclep_static_shape
moe_ncclep_use_symm_mem moe_ncclep_zero_copy moe_pad_expert_input_to_capacity
moe_shared_expert_overlap moe_token_dispatcher_type moe_token_drop_policy mtp_standalone
nccl_all_reduce_for_prefill num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage
overlap_dispatch_backward_with_experts_wgrad overlap_moe_expert_parallel_comm overlap_p2p_comm
overlap_p2p_comm_warmup_flush parallel_output pipeline_model_parallel_comm_backend
pipeline_model_parallel_layout pipeline_model_parallel_size pipeline_model_parallel_split_rank
scatter_embedding_sequence_parallel sequence_parallel symmetric_ar_type tensor_model_parallel_size
tensor_parallel_num_weight_shards tp_comm_atomic_ag tp_comm_atomic_rs tp_comm_bootstrap_backend
tp_comm_bulk_dgrad tp_comm_bulk_wgrad tp_comm_overlap tp_comm_overlap_ag tp_comm_overlap_cfg
tp_comm_overlap_disable_fc1 tp_comm_overlap_disable_qkv tp_comm_overlap_rs tp_comm_overlap_rs_dgrad
tp_comm_split_ag tp_comm_split_rs use_ring_exchange_p2p variable_seq_lengths
virtual_pipeline_model_parallel_size wgrad_deferral_limit

_cpu_offloading_context activation_offload_fraction cpu_offloading cpu_offloading_activations
cpu_offloading_double_buffering cpu_offloading_num_layers cpu_offloading_retain_pinned_cpu_buffers
cpu_offloading_weights cuda_graph_impl cuda_graph_modules cuda_graph_retain_backward_graph
cuda_graph_scope cuda_graph_use_single_mempool cuda_graph_warmup_steps
delay_offload_until_cuda_graph delta_offload_bytes_across_pp_ranks disable_parameter_transpose_cache
distribute_saved_activations enable_cuda_graph external_cuda_graph
fine_grained_activation_offloading fine_grained_offloading_max_inflight_offloads
hetereogenous_dist_checkpoint inference_cuda_graph_scope inference_disable_triton_nvls_kernels
inference_fuse_tp_communication inference_grouped_gemm_backend
inference_moe_disable_fused_quant_kernels inference_moe_token_dispatcher_type inference_rng_tracker
inference_sampling_seed min_offloaded_tensor_size mlp_chunks_for_prefill mlp_chunks_for_training
moe_layer_recompute moe_pad_experts_for_cuda_graph_inference moe_paged_stash
moe_paged_stash_buffer_size_factor_cpu moe_paged_stash_buffer_size_factor_cuda
moe_paged_stash_page_size moe_single_grouped_bias moe_single_grouped_weight moe_use_grouped_tensor
moe_use_legacy_grouped_gemm num_microbatches_with_partial_activation_checkpoints offload_modules
recompute_granularity recompute_method recompute_modules recompute_num_layers
use_grouped_gemm_for_dense_mlp use_inference_optimized_layers use_te_rng_tracker

_pg_collection add_qkv_bias bias_dropout_add_fusion generation_config hf_model_id hf_model_revision
make_vocab_size_divisible_by mtp_enabled restore_modelopt_state rope_scaling_factor
rotary_scaling_factor seq_length should_pad_vocab

beta_fast beta_slow cache_mla_latents dsa_indexer_head_dim dsa_indexer_k_norm_epsilon
dsa_indexer_k_norm_fp32 dsa_indexer_loss_coeff dsa_indexer_n_heads dsa_indexer_rope_interleaved
dsa_indexer_rotate_activation dsa_indexer_scoring_relu dsa_indexer_skip_topk_offset dsa_indexer_topk
dsa_indexer_topk_freq dsa_indexer_use_sparse_loss dsa_kernel_backend gdp_cutedsl_kernel
gdp_num_chunk_states_to_recompute gdp_num_householder heterogeneous_layers_config_encoded_json
kv_lora_rank linear_conv_kernel_dim linear_key_head_dim linear_num_key_heads linear_num_value_heads
linear_value_head_dim mamba_head_dim mamba_num_groups mamba_num_heads mamba_state_dim
mamba_training_ssm_states_dtype max_position_embeddings mhc_init_gating_factor
mhc_num_residual_streams mhc_recompute_layer_num mhc_sinkhorn_iterations mla_down_proj_fusion
moe_shared_expert_gate moe_shared_expert_glu_interleave_size mscale mscale_all_dim mtp_hsm
mtp_hybrid_override_pattern mtp_use_repeated_layer mup_attn_scale_power mup_base_head_dim
mup_base_hidden_size mup_embedding_mult mup_output_mult mup_width_mult
original_max_position_embeddings per_block_parameters q_lora_rank qk_head_dim qk_pos_emb_head_dim
rope_type use_grouped_gemm_for_shared_expert use_mamba_mem_eff_path v_head_dim
"""
HARMLESS = frozenset(_HARMLESS.split())
"""Fields without influence on what the weights compute. By paragraph: kernels and precision;
initialisation, losses and regularisation of training; parallel sizes and communication; memory,
CUDA graphs and inference engines; what describes the run, or says what add_bias_linear says too;
options of features that FIELDS refuses (shared experts, multi-token prediction, hybrid models,
other attentions, muP), read with them only.
"""
