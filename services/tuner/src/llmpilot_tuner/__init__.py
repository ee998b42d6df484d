"""The tuner: the largest maximum batch weight of an LLM on a GPU profile that no admissible batch can break."""
