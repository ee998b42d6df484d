"""Recommends the cheapest GPU deployment that serves an LLM to its users within latency limits."""
