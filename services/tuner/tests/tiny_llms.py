"""Tiny LLMs for tests: config.json texts of the families of the paper, with just over the million parameters asked for.

Read with `runpy` or by path: `importlib` test modules do not see their neighbours as a package.
"""

import json

_SIZES = {
    "llama-mha": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 128,
        "intermediate_size": 344,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 2048,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "llama-gqa": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 128,
        "intermediate_size": 344,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 2048,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "gpt-neox": {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "vocab_size": 2048,
        "max_position_embeddings": 2048,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
    },
    "gpt-bigcode": {
        "model_type": "gpt_bigcode",
        "architectures": ["GPTBigCodeForCausalLM"],
        "n_embd": 128,
        "n_inner": 512,
        "n_layer": 4,
        "n_head": 8,
        "n_positions": 2048,
        "multi_query": True,
        "vocab_size": 2048,
        "tie_word_embeddings": True,
    },
    "t5": {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "is_encoder_decoder": True,
        "d_model": 128,
        "d_ff": 320,
        "d_kv": 16,
        "num_layers": 3,
        "num_decoder_layers": 3,
        "num_heads": 8,
        "vocab_size": 2048,
        "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    },
    "mixtral": {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "vocab_size": 2048,
        "max_position_embeddings": 4096,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
}

TINY_LLMS: dict[str, str] = {name: json.dumps(sizes | {"torch_dtype": "float32"}) for name, sizes in _SIZES.items()}
"""Name to config.json: llama-mha, llama-gqa, gpt-neox, gpt-bigcode (one key/value head), t5, mixtral."""


def tiny_llm(name: str, **changes: object) -> str:
    """Return the config.json of a tiny LLM with some keys changed."""
    return json.dumps(json.loads(TINY_LLMS[name]) | changes)
