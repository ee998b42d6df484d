"""A worker that does one thing, said by its argument: what a supervisor must live with."""

import os
import signal
import sys
import time

from llmpilot_loadtester.worker_messages import Failed, Kind, MessageReader, Probed, pack_json, pack_message

A_WHILE_SECONDS = 0.3
NEVER_SECONDS = 3600


def say(message: bytes) -> None:
    sys.stdout.buffer.write(message)
    sys.stdout.buffer.flush()


def echo() -> None:
    """Gives requests back as records, until the pipe ends."""
    reader = MessageReader()
    while data := os.read(0, 1 << 16):
        for kind, payload in reader.feed(data):
            say(pack_message(Kind.RECORDS if kind is Kind.REQUESTS else Kind.STAGE_ENDED, payload))


def die() -> None:
    """Says something, complains and ends."""
    say(pack_message(Kind.RECORDS, b"the last"))
    sys.stderr.write("".join(f"line {number}\n" for number in range(1000)))
    sys.exit(3)


def hang() -> None:
    """Neither reads nor writes nor ends when asked."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say(pack_message(Kind.RECORDS, b"ready"))
    time.sleep(NEVER_SECONDS)


def garble() -> None:
    """Says something, then what is no message."""
    say(pack_message(Kind.RECORDS, b"good") + b"HTTP/1.1 200 OK\r\n\r\n")
    time.sleep(NEVER_SECONDS)


def fail() -> None:
    """Cannot go on, but still says what was recorded."""
    say(pack_json(Kind.FAILED, Failed(message="the sky fell")))
    say(pack_message(Kind.RECORDS, b"the rest"))
    say(pack_json(Kind.STAGE_ENDED, Probed()))


def flood() -> None:
    """Writes as much as is taken, then tells how much that was."""
    os.set_blocking(1, False)
    message = pack_message(Kind.RECORDS, bytes(1 << 16))
    written_count, full_since = 0, None
    while full_since is None or time.monotonic() - full_since < A_WHILE_SECONDS:
        try:
            written_count += os.write(1, message[written_count % len(message) :])
            full_since = None
        except BlockingIOError:
            full_since = full_since or time.monotonic()
            time.sleep(0.001)
    sys.stderr.write(f"{written_count} bytes\n")


if __name__ == "__main__":
    {"echo": echo, "die": die, "hang": hang, "garble": garble, "fail": fail, "flood": flood}[sys.argv[1]]()
