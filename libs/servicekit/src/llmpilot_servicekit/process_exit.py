"""How a process ended, in words."""

import signal


def describe_exit(exit_code: int) -> str:
    """Word an exit code: "ended with code 1", "was killed by SIGKILL"."""
    if exit_code >= 0:
        return f"ended with code {exit_code}"
    try:
        return f"was killed by {signal.Signals(-exit_code).name}"
    except ValueError:  # a real-time signal has no name
        return f"was killed by signal {-exit_code}"
