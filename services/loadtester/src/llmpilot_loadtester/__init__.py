"""Load tests of LLM inference servers: Locust users, kernel timestamps of every token, metrics, verdicts."""
