"""`llm-pilot tune`."""

import click


@click.command()
def tune() -> None:
    """Find the largest maximum batch weight that no batch can break."""
