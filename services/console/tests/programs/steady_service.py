"""A service with nothing but health, until it is told to stop."""

import sys

from llmpilot_servicekit.logs import configure_logs
from llmpilot_servicekit.server import run, serve
from llmpilot_servicekit.settings import ServiceSettings, load_settings


async def _main() -> None:
    settings = load_settings(ServiceSettings)
    configure_logs(settings)
    await serve(settings, registrations=[])


def main() -> int:
    """Run the service."""
    return run(_main)


if __name__ == "__main__":
    sys.exit(main())
