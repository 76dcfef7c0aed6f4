"""Tiny configurations of many families of transformers, and what each does one token past its limit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LENGTH = 64
"""The trained length of every family that has one: before the extension, where a rope extension is configured."""


@dataclass(frozen=True)
class Family:
    """`config` is for `AutoConfig.for_model(model_type, **config)`; `{length_field: 200}` over it trains to 200 instead.

    `hard`: a forward over LENGTH tokens works and one over LENGTH + 1 raises. With `seq2seq`, the encoder reads the tokens.
    """

    model_type: str
    config: dict[str, Any]
    schemes: tuple[str, ...]
    hard: bool
    length_field: str | None
    seq2seq: bool = False


IDS = {"vocab_size": 600, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PLAIN = {**IDS, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {**PLAIN, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": LENGTH}
KV = {**HEADS, "num_key_value_heads": 2}
WIDE = {**KV, "head_dim": 8}
GPT = {**IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": LENGTH}
T5 = {**IDS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
CODER = {"encoder_layers": 2, "encoder_ffn_dim": 48, "encoder_attention_heads": 4}
DECODER = {"decoder_layers": 2, "decoder_ffn_dim": 48, "decoder_attention_heads": 4, "decoder_start_token_id": 0}
BART = {**IDS, **CODER, **DECODER, "d_model": 32, "max_position_embeddings": LENGTH}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 24}
LOCAL = {"num_local_experts": 2, "num_experts_per_tok": 1}
ROUTED = {"n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 24}
MAMBA2 = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_chunk_size": 16}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
DELTA = {
    **LINEAR,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
PER_LAYER = {"vocab_size_per_layer_input": 600, "hidden_size_per_layer_input": 8}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
DEEPSEEK = {**HEADS, **LATENT, **ROUTED, "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
ZAMBA = {"mamba_d_state": 8, "n_mamba_heads": 4, "chunk_size": 16, "layers_block_type": ["mamba", "hybrid"], "adapter_rank": 4}
TWICE = {"max_position_embeddings": 2 * LENGTH}
ROPE = {"rope_theta": 10000.0}
YARN = {**ROPE, "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": LENGTH}
PHI = {"original_max_position_embeddings": LENGTH, "partial_rotary_factor": 1.0}  # else Phi3Config writes them into the dict
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 1.5, 2.0, 2.5]}


def _rotary(model_type: str, config: dict[str, Any], *others: str) -> Family:
    return Family(model_type, config, ("rotary", *others), False, "max_position_embeddings")


def _table(model_type: str, config: dict[str, Any], scheme: str, field: str = "n_positions", **options: Any) -> Family:
    return Family(model_type, config, (scheme,), True, field, **options)


def _unbounded(model_type: str, config: dict[str, Any], *schemes: str, field: str | None = None, **options: Any) -> Family:
    return Family(model_type, config, schemes, False, field, **options)


def _seq2seq(model_type: str, scheme: str, hard: bool = True, **changes: Any) -> Family:
    return Family(model_type, {**BART, **changes}, (scheme,), hard, "max_position_embeddings", seq2seq=True)


FAMILIES: dict[str, Family] = {
    # learned tables
    "gpt2": _table("gpt2", GPT, "learned"),
    "gpt_bigcode": _table("gpt_bigcode", GPT, "learned"),
    "openai-gpt": _table("openai-gpt", GPT, "learned"),
    "opt": _table(
        "opt",
        {**PLAIN, "num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": LENGTH},
        "learned",
        "max_position_embeddings",
    ),
    "gpt_neo": _table(
        "gpt_neo",
        {**IDS, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": LENGTH}
        | {"attention_types": [[["global", "local"], 1]], "window_size": 16},
        "learned",
        "max_position_embeddings",
    ),
    "biogpt": _table("biogpt", HEADS, "learned", "max_position_embeddings"),
    "xlm": _table(
        "xlm",
        {**IDS, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "causal": True, "max_position_embeddings": LENGTH},
        "learned",
        "max_position_embeddings",
    ),
    "bert": _table("bert", {**HEADS, "is_decoder": True}, "learned", "max_position_embeddings"),
    "reformer": _table(
        "reformer",
        {**IDS, "hidden_size": 32, "num_attention_heads": 4, "attention_head_size": 8, "feed_forward_size": 48, "is_decoder": True}
        | {"attn_layers": ["local", "lsh"], "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "num_buckets": 4}
        | {"hash_seed": 0, "axial_pos_embds": False, "max_position_embeddings": LENGTH},
        "learned",
        "max_position_embeddings",
    ),
    # fixed sinusoids
    "ctrl": _table("ctrl", {**GPT, "dff": 48}, "sinusoidal"),
    "xglm": _unbounded(
        "xglm",
        {**IDS, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": LENGTH},
        "sinusoidal",
        field="max_position_embeddings",
    ),
    # rotary angles from a fixed table
    "gptj": _table("gptj", {**GPT, "rotary_dim": 4}, "rotary_table"),
    "codegen": _table("codegen", {**GPT, "n_ctx": LENGTH, "rotary_dim": 4}, "rotary_table"),
    "roformer": _table("roformer", {**HEADS, "is_decoder": True}, "rotary_table", "max_position_embeddings"),
    # rotary angles computed from positions
    "llama": _rotary("llama", KV),
    "llama-linear": _rotary("llama", {**KV, "rope_parameters": {**ROPE, "rope_type": "linear", "factor": 2.0}}),
    "llama-dynamic": _rotary("llama", {**KV, "rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0}}),
    "llama-yarn": _rotary("llama", {**KV, **TWICE, "rope_parameters": YARN}),
    "llama-longrope": _rotary("llama", {**KV, **TWICE, "rope_parameters": {**YARN, **FACTORS, "rope_type": "longrope"}}),
    "llama3": _rotary(
        "llama",
        {**KV, **TWICE, "rope_parameters": {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    ),
    "mistral": _rotary("mistral", {**KV, "sliding_window": None}),
    "mistral-window": _rotary("mistral", {**KV, "sliding_window": 16}),
    "ministral": _rotary("ministral", {**WIDE, **SLIDING}),
    "mixtral": _rotary("mixtral", {**KV, **LOCAL}),
    "qwen2": _rotary("qwen2", KV),
    "qwen3": _rotary("qwen3", WIDE),
    "qwen2_moe": _rotary("qwen2_moe", {**KV, **EXPERTS, "shared_expert_intermediate_size": 24}),
    "qwen3_moe": _rotary("qwen3_moe", {**WIDE, **EXPERTS}),
    "gemma": _rotary("gemma", WIDE),
    "gemma2": _rotary("gemma2", {**WIDE, **SLIDING, "query_pre_attn_scalar": 8}),
    "gemma3": _rotary(
        "gemma3_text",
        {**WIDE, **SLIDING, "query_pre_attn_scalar": 8}
        | {"rope_parameters": {kind: {**ROPE, "rope_type": "default"} for kind in ("sliding_attention", "full_attention")}},
    ),
    "gemma3n": _rotary("gemma3n_text", {**WIDE, **SLIDING, **PER_LAYER, "num_kv_shared_layers": 0, "laurel_rank": 4}),
    "gemma4": _rotary("gemma4_text", {**WIDE, **SLIDING, **PER_LAYER, "global_head_dim": 16}),
    "mimo_v2_flash": _rotary("mimo_v2_flash", {**WIDE, **SLIDING, **ROUTED, "head_dim": 12, "v_head_dim": 8}),
    "phi": _rotary("phi", {**KV, "partial_rotary_factor": 0.5}),
    "phi3": _rotary("phi3", {**KV, "original_max_position_embeddings": LENGTH}),
    "phi3-longrope": _rotary(
        "phi3",
        {**KV, **TWICE, "original_max_position_embeddings": LENGTH}
        | {"rope_parameters": {**ROPE, **FACTORS, **PHI, "rope_type": "longrope"}},
    ),
    "phimoe": _rotary("phimoe", {**KV, **LOCAL}),
    "gpt_neox": _rotary("gpt_neox", {**HEADS, "num_attention_heads": 2}),
    "gpt_neox_japanese": _rotary("gpt_neox_japanese", HEADS),
    "persimmon": _rotary("persimmon", HEADS),
    "stablelm": _rotary("stablelm", {**HEADS, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "starcoder2": _rotary("starcoder2", KV),
    "olmo": _rotary("olmo", KV),
    "olmo2": _rotary("olmo2", KV),
    "olmo3": _rotary("olmo3", {**KV, **SLIDING}),
    "olmoe": _rotary("olmoe", {**KV, **EXPERTS}),
    "cohere": _rotary("cohere", KV),
    "glm": _rotary("glm", WIDE),
    "glm4": _rotary("glm4", WIDE),
    "granite": _rotary("granite", KV),
    "nemotron": _rotary("nemotron", WIDE),
    "helium": _rotary("helium", WIDE),
    "ernie4_5": _rotary("ernie4_5", WIDE),
    "arcee": _rotary("arcee", KV),
    "apertus": _rotary("apertus", {**KV, "rope_parameters": {**ROPE, "rope_type": "default"}}),
    "diffllama": _rotary("diffllama", KV),
    "nanochat": _rotary("nanochat", KV),
    "bitnet": _rotary("bitnet", KV),
    "seed_oss": _rotary("seed_oss", WIDE),
    "modernbert-decoder": _rotary("modernbert-decoder", {**HEADS, "local_attention": 16}),
    "dbrx": Family(
        "dbrx",
        {**IDS, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": LENGTH}
        | {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}}
        | {"ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 2, "moe_top_k": 1}},
        ("rotary",),
        False,
        "max_seq_len",
    ),
    "deepseek_v2": _rotary("deepseek_v2", DEEPSEEK),
    "deepseek_v3": _rotary("deepseek_v3", DEEPSEEK),
    "hunyuan_v1_dense": _rotary("hunyuan_v1_dense", WIDE),
    "gpt_oss": _rotary("gpt_oss", {**WIDE, **TWICE, **SLIDING, **LOCAL, "rope_parameters": YARN}),
    "falcon": _rotary("falcon", HEADS),
    # some layers with rotary angles, some with no position at all
    "smollm3": _rotary("smollm3", {**KV, "no_rope_layer_interval": 2}, "none"),
    "cohere2": _rotary("cohere2", {**KV, **SLIDING}, "none"),
    "exaone4": _rotary("exaone4", {**KV, **SLIDING}, "none"),
    "llama4": _rotary(
        "llama4_text",
        {**WIDE, "intermediate_size_mlp": 48, "num_local_experts": 2, "no_rope_layers": [1, 0], "attention_chunk_size": 16},
        "none",
    ),
    # a bias by distance (CPM-Ant and XLNet also read what comes after)
    "falcon-alibi": _unbounded("falcon", {**HEADS, "alibi": True}, "alibi", field="max_position_embeddings"),
    "bloom": _unbounded("bloom", {**IDS, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "alibi"),
    "mpt": _table("mpt", {**IDS, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": LENGTH}, "alibi", "max_seq_len"),
    "cpmant": _unbounded(
        "cpmant",
        {**PLAIN, "num_attention_heads": 4, "dim_head": 8, "dim_ff": 48, "position_bias_num_buckets": 32}
        | {"position_bias_max_distance": LENGTH, "prompt_length": 4, "prompt_types": 4, "segment_types": 4},
        "bucketed",
    ),
    "xlnet": _unbounded("xlnet", {**IDS, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}, "relative"),
    # recurrent, alone and beside attention
    "mamba": _unbounded("mamba", {**PLAIN, "state_size": 4}, "recurrent"),
    "mamba2": _unbounded(
        "mamba2", {**PLAIN, "state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 16}, "recurrent"
    ),
    "falcon_mamba": _unbounded("falcon_mamba", {**PLAIN, "state_size": 4}, "recurrent"),
    "rwkv": _unbounded("rwkv", {**PLAIN, "context_length": LENGTH}, "recurrent", field="context_length"),
    "recurrent_gemma": _unbounded(
        "recurrent_gemma",
        {**PLAIN, "num_attention_heads": 4, "intermediate_size": 48, "block_types": ["recurrent", "attention"]}
        | {"attention_window_size": 16},
        "rotary",
        "recurrent",
    ),
    "lfm2": _rotary("lfm2", {**KV, "layer_types": ["conv", "full_attention"]}, "recurrent"),
    "falcon_h1": _rotary("falcon_h1", {**KV, **MAMBA2, "mamba_d_ssm": 64}, "recurrent"),
    "bamba": _rotary("bamba", {**KV, **MAMBA2, "attn_layer_indices": [1]}, "recurrent"),
    "qwen3_next": _rotary(
        "qwen3_next", {**WIDE, **EXPERTS, **DELTA, "head_dim": 16, "shared_expert_intermediate_size": 24}, "recurrent"
    ),
    "qwen3_5": _rotary("qwen3_5_text", {**WIDE, **DELTA, "head_dim": 16}, "recurrent"),
    "olmo_hybrid": _rotary("olmo_hybrid", {**KV, **DELTA}, "recurrent"),
    "minimax": _rotary("minimax", {**WIDE, **LOCAL, **LINEAR, "block_size": 16}, "recurrent"),
    "zamba2-rotary": _rotary("zamba2", {**KV, **ZAMBA, "use_mem_rope": True}, "recurrent"),
    "zamba2": _unbounded("zamba2", {**KV, **ZAMBA}, "none", "recurrent", field="max_position_embeddings"),
    "jamba": _unbounded(
        "jamba",
        {**KV, "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1}
        | {"mamba_d_state": 4, "use_mamba_kernels": False},
        "none",
        "recurrent",
        field="max_position_embeddings",
    ),
    "granitemoehybrid": _unbounded(
        "granitemoehybrid",
        {**KV, **MAMBA2, **LOCAL, "shared_intermediate_size": 24, "layer_types": ["mamba", "attention"]},
        "none",
        "recurrent",
        field="max_position_embeddings",
    ),
    "kimi_linear": _unbounded(
        "kimi_linear",
        {**HEADS, **LATENT, **LOCAL, **LINEAR, "moe_intermediate_size": 24, "num_key_value_heads": 4}
        | {"q_lora_rank": None, "linear_head_dim": 8, "linear_num_heads": 2},
        "none",
        "recurrent",
        field="max_position_embeddings",
    ),
    "nemotron_h": _unbounded(
        "nemotron_h",
        {**IDS, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
        | {"ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "chunk_size": 16}
        | {"layers_block_type": ["mamba", "attention"], "max_position_embeddings": LENGTH},
        "none",
        "recurrent",
        field="max_position_embeddings",
    ),
    # an encoder and a decoder
    "t5": _unbounded("t5", T5, "bucketed", seq2seq=True),
    "mt5": _unbounded("mt5", T5, "bucketed", seq2seq=True),
    "umt5": _unbounded("umt5", T5, "bucketed", seq2seq=True),
    "longt5": _unbounded("longt5", {**T5, "local_radius": 15}, "bucketed", seq2seq=True),
    "switch_transformers": _unbounded(
        "switch_transformers",
        {**T5, "num_decoder_layers": 2, "num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
        "bucketed",
        seq2seq=True,
    ),
    "t5gemma": Family(
        "t5gemma",
        {"vocab_size": 600} | {side: {**WIDE, **SLIDING, "query_pre_attn_scalar": 8} for side in ("encoder", "decoder")},
        ("rotary",),
        False,
        None,
        seq2seq=True,
    ),
    "bart": _seq2seq("bart", "learned"),
    "mbart": _seq2seq("mbart", "learned"),
    "blenderbot": _seq2seq("blenderbot", "learned"),
    "bigbird_pegasus": _seq2seq("bigbird_pegasus", "learned", attention_type="original_full"),
    "led": Family(
        "led",
        {**IDS, **CODER, **DECODER, "d_model": 32, "attention_window": 8}
        | {"max_encoder_position_embeddings": LENGTH, "max_decoder_position_embeddings": LENGTH},
        ("learned",),
        True,
        "max_encoder_position_embeddings",
        seq2seq=True,
    ),
    "prophetnet": Family(
        "prophetnet",
        {**IDS, "hidden_size": 32, "encoder_ffn_dim": 48, "num_encoder_layers": 2, "num_encoder_attention_heads": 4}
        | {"decoder_ffn_dim": 48, "num_decoder_layers": 2, "num_decoder_attention_heads": 4, "decoder_start_token_id": 0}
        | {"max_position_embeddings": LENGTH},
        ("learned", "bucketed"),
        False,
        "max_position_embeddings",
        seq2seq=True,
    ),
    "pegasus": _seq2seq("pegasus", "sinusoidal"),
    "marian": _seq2seq("marian", "sinusoidal"),
    "nllb-moe": _seq2seq("nllb-moe", "sinusoidal", hard=False, num_experts=2),
    "m2m_100": _seq2seq("m2m_100", "sinusoidal", hard=False),
    "fsmt": _seq2seq("fsmt", "sinusoidal", hard=False, langs=["en", "de"], src_vocab_size=600, tgt_vocab_size=600),
    "pegasus_x": _seq2seq("pegasus_x", "sinusoidal", hard=False, block_size=16, num_global_tokens=4),
}
