"""`python -m llmpilot_loadtester`: run load tests."""

import sys

from llmpilot_loadtester.app import run
from llmpilot_loadtester.settings import LoadTesterSettings
from llmpilot_servicekit.logs import configure_logs
from llmpilot_servicekit.server import run as run_process
from llmpilot_servicekit.settings import load_settings


async def _main() -> None:
    settings = load_settings(LoadTesterSettings)
    configure_logs(settings)
    await run(settings)


def main() -> int:
    """Run the service; returns the exit code."""
    return run_process(_main)


if __name__ == "__main__":
    sys.exit(main())
