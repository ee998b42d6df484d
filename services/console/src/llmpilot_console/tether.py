"""Runs a command that dies with its parent: `python tether.py PARENT_PID COMMAND...`.

On Linux the kernel is asked to kill this process when the thread that started it ends (PR_SET_PDEATHSIG, prctl(2)); the
request survives the exec into the command. Elsewhere the command just runs. A launcher instead of a `preexec_fn`,
because the latter runs Python between fork and exec, which is unsafe in a process with threads.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Tie this process to its parent, then become the command."""
    parent_pid, *command = arguments
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(parent_pid):  # the parent ended before the request took effect
            sys.exit(1)
    os.execvp(command[0], command)  # noqa: S606 - no shell is wanted


if __name__ == "__main__":
    main(sys.argv[1:])
