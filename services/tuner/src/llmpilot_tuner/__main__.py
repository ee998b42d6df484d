"""`python -m llmpilot_tuner`: run tunings."""

import sys

from llmpilot_servicekit.logs import configure_logs
from llmpilot_servicekit.server import run as run_process
from llmpilot_servicekit.settings import load_settings
from llmpilot_tuner.app import run
from llmpilot_tuner.settings import TunerSettings


async def _main() -> None:
    settings = load_settings(TunerSettings)
    configure_logs(settings)
    await run(settings)


def main() -> int:
    """Run the service; returns the exit code."""
    return run_process(_main)


if __name__ == "__main__":
    sys.exit(main())
