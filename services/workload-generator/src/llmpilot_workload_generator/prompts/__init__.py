"""Requests as text: prompts with exactly the drawn number of tokens, and what servers are sent."""
