"""A service that runs and never serves."""

import signal

print("loading for ever", flush=True)  # noqa: T201 the log of the service
signal.pause()
