"""`python -m llmpilot_tuner`: run tunings."""


def main() -> int:
    """Run the service; returns the exit code."""
    return 0
