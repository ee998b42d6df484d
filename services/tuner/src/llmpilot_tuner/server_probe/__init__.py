"""Tuning with an inference server itself: started, asked for its memory, and sent the corner cases as requests."""
