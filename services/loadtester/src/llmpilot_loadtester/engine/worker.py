"""A worker process: a part of the users of a stage, in one process, told what to do over a pipe.

Invariant: nothing but messages leaves by standard output. Started as `python -m llmpilot_loadtester.engine.worker` by
the supervisor; Locust, which prints and patches the standard library, is imported when the pipes are safe from it.
"""

import ctypes
import logging
import os
import resource
import signal
import sys
from contextlib import suppress
from typing import NoReturn

_PR_SET_PDEATHSIG = 1
_PRIORITY = -10


def main() -> NoReturn:
    """Serve until the supervisor closes the pipe, or says SIGTERM; one that is stopped (SIGSTOP) dies with it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with suppress(OSError):  # only root may: who sends in time comes before who counts, where they share a core
        os.setpriority(os.PRIO_PROCESS, 0, _PRIORITY)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the supervisor to decide
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # until there is something to record
    from gevent import monkey  # noqa: PLC0415

    monkey.patch_all()
    from llmpilot_loadtester.engine.pipes import take_over_pipes  # noqa: PLC0415

    inbound, outbound = take_over_pipes()
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    from llmpilot_loadtester.engine.worker_loop import WorkerLoop  # noqa: PLC0415 takes a second, and prints

    exit_code = WorkerLoop(inbound, outbound).run()
    sys.stderr.flush()
    os._exit(exit_code)  # nothing is left to do, and the threads of gevent need not be waited for


if __name__ == "__main__":
    main()
