"""The least that a client can do: sockets, one epoll, kernel receive stamps, no parsing, nothing of Locust.

    python benchmarks/loadtest/bare_client.py ADDRESS MODEL STREAMS SECONDS OUTPUT_TOKENS RESULT

Its errors are those of the server's log and of the kernel: no other client can be judged more finely than this one.
"""

import json
import select
import socket
import struct
import sys
import time
from pathlib import Path

_SO_TIMESTAMPNS = 35
_STAMP = struct.Struct("qq")


class Stream:
    """One connection, one request after another."""

    def __init__(self, host: str, port: int, head: bytes, body: bytes) -> None:
        self.socket = socket.create_connection((host, port))
        self.socket.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.head = head
        self.body = body
        self.request_id = ""
        self.send_nanos = 0
        self.stamps: list[int] = []

    def send(self, number: int) -> None:
        """Send a request."""
        self.request_id = f"bare-{number}"
        self.stamps = []
        message = self.head % (number, len(self.body)) + self.body
        self.send_nanos = time.time_ns()
        self.socket.send(message)

    def read(self) -> bool:
        """Take what came; returns whether the reply is whole."""
        part, ancillary, _, _ = self.socket.recvmsg(65536, 64)
        if b'"text":"' in part:
            seconds, nanos = _STAMP.unpack(ancillary[0][2])
            self.stamps.append(seconds * 1_000_000_000 + nanos)
        return part.endswith(b"0\r\n\r\n")


def main() -> None:
    """Keep the streams busy and write send time and stamps of every reply."""
    address, model, result = sys.argv[1], sys.argv[2], Path(sys.argv[6])
    stream_count, seconds, output_tokens = int(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5])
    host, _, port = address.rpartition(":")
    body = json.dumps(
        {"model": model, "prompt": "hello world " * 16, "max_tokens": output_tokens, "stream": True, "ignore_eos": True}
    ).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: golden\r\nX-Request-Id: bare-%d\r\nContent-Length: %d\r\n\r\n"
    poller = select.epoll()
    streams: dict[int, Stream] = {}
    replies: list[tuple[str, int, list[int]]] = []
    sent = 0
    start = time.monotonic()
    while (now := time.monotonic() - start) < seconds or streams:
        while len(streams) < stream_count and now < seconds and sent <= now * stream_count:
            stream = Stream(host, int(port), head, body)
            streams[stream.socket.fileno()] = stream
            poller.register(stream.socket, select.EPOLLIN)
            stream.send(sent)
            sent += 1
        for descriptor, _ in poller.poll(0.001 if len(streams) < stream_count and now < seconds else 0.1):
            stream = streams[descriptor]
            if not stream.read():
                continue
            replies.append((stream.request_id, stream.send_nanos, stream.stamps))
            if now < seconds:
                stream.send(sent)
                sent += 1
            else:
                poller.unregister(descriptor)
                streams.pop(descriptor).socket.close()
    result.write_text(json.dumps(replies))


if __name__ == "__main__":
    main()
