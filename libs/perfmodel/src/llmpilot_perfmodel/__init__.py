"""The physics of LLM inference, pure: LLM specs from a config.json, the GPU catalogue, prices, memory."""
