"""`llm-pilot`, also `python -m llmpilot_console`."""

import signal

from llmpilot_console.cli import pilot


def main() -> None:
    """Run the command line; a polite kill and a closed terminal stop it as Ctrl-C does."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    pilot.main(prog_name="llm-pilot")


if __name__ == "__main__":
    main()
