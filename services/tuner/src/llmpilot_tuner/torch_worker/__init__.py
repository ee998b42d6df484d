"""What runs in the worker process: the LLM itself under PyTorch. Nothing outside this package imports torch."""
