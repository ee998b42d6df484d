"""Continuous batching: scheduling policies, the engine that follows them, and simulations with it."""
