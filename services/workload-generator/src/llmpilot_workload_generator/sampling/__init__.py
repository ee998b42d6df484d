"""Requests drawn from a model, each a function of seed and index."""
