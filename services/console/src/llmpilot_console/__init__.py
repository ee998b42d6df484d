"""The `llm-pilot` command line and the local supervisor: composes services without knowing what is inside them."""
