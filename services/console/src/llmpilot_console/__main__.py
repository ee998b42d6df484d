"""`llm-pilot`, also `python -m llmpilot_console`."""

import signal
import sys


def main() -> None:
    """Run the command line; a polite kill and a closed terminal stop it as Ctrl-C does."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    try:
        from llmpilot_console.cli import pilot  # noqa: PLC0415 takes long enough to be interrupted

        pilot.main(prog_name="llm-pilot")
    except KeyboardInterrupt:
        sys.stderr.write("cancelled\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
