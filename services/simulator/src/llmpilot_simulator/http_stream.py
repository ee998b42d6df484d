"""A streamed reply: the frames of its tokens go straight to the connection when they are due.

Invariant: tokens leave in order and each once; what a client does not read waits as token numbers, not as bytes, so a
slow reader costs the server no more memory than its reply's text.

aiohttp has parsed the request and sent the head of the response; frames bypass its writer, which costs more than the
system call.
"""

import asyncio
import socket
import struct
from typing import Protocol

from llmpilot_simulator.clock import Clock, nanos
from llmpilot_simulator.faults import Faults
from llmpilot_simulator.pace import OUT_OF_MEMORY
from llmpilot_simulator.realtime import RealTimeServer, Ticket
from llmpilot_simulator.write_log import WriteLog

RETRY_NANOS = 2_000_000
"""How often a connection whose client does not read is looked at."""
_NEVER = 1 << 62
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


def first_fault_index(faults: Faults) -> int:
    """Return the token that will not leave."""
    indices = (faults.drop_after, faults.reset_after, faults.out_of_memory_after)
    return min((index for index in indices if index is not None), default=_NEVER)


class ChoiceFrames(Protocol):
    """The wire form of one choice. Everything is ASCII, whole server-sent events."""

    def tokens(self, first_index: int, count: int) -> str:
        """Return the frame of some tokens."""
        ...


class ReplyFrames(Protocol):
    """The wire form of what the choices share."""

    def opening(self) -> str:
        """Return what comes before the first token; "": nothing."""
        ...

    def closing(self) -> str:
        """Return what comes after the last token; "": nothing."""
        ...

    def failure(self, message: str) -> str:
        """Return what comes when the server gives up."""
        ...


def chunk(frame: str) -> bytes:
    """Return a frame as a chunk of HTTP/1.1 (RFC 9112, 7.1)."""
    return f"{len(frame):x}\r\n{frame}\r\n".encode("ascii")


def unchunked(frame: str) -> bytes:
    """Return a frame as HTTP/1.0 has it."""
    return frame.encode("ascii")


def drop(transport: asyncio.Transport, *, by_reset: bool) -> None:
    """Close a connection without a word, by TCP reset or by an ordinary end."""
    if by_reset:
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    transport.abort()


class StreamedReply:
    """The connection that the choices of one response share. `finished` is done when nothing more will be written."""

    def __init__(
        self,
        *,
        transport: asyncio.Transport,
        frames: ReplyFrames,
        server: RealTimeServer,
        clock: Clock,
        log: WriteLog | None,
        faults: Faults,
        slow_reader_seconds: float,
        is_chunked: bool,
        choice_count: int,
    ) -> None:
        self.transport = transport
        self.server = server
        self.clock = clock
        self.log = log
        self.faults = faults
        self.encode = chunk if is_chunked else unchunked
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._frames = frames
        self._open_choices = choice_count
        self._choices: list[StreamedChoice] = []
        self._slow_reader_nanos = nanos(slow_reader_seconds)
        self._stalled_since_nanos: int | None = None
        self._is_opened = faults.role_chunk == "off"

    def begin(self) -> None:
        """Say that the head of the response has left."""
        if self.faults.role_chunk == "early":
            self.open()

    def add(self, choice: "StreamedChoice") -> None:
        """Take part of the connection."""
        self._choices.append(choice)

    def open(self) -> None:
        """Send what comes before the first token, once."""
        if not self._is_opened:
            self._is_opened = True
            self._write(self._frames.opening())

    def end_choice(self, failure: str | None) -> None:
        """Count a choice out; the last one closes the reply, and so does a failure."""
        if self.finished.done():
            return
        self._open_choices -= 1
        if failure is not None:
            self._write(self._frames.failure(failure))
            self._finish()
        elif not self._open_choices:
            self.open()
            self._write(self._frames.closing())
            self._finish()

    def drop(self, *, by_reset: bool) -> None:
        """Close the connection in the middle of the reply."""
        drop(self.transport, by_reset=by_reset)
        self._finish()

    def stall(self) -> None:
        """Wait for a client that does not read."""
        if self._stalled_since_nanos is None:
            self._stalled_since_nanos = now_nanos = self.server.now_nanos()
            self.server.statistics.slow_reader_pauses += 1
            self.server.at(now_nanos + RETRY_NANOS, self)

    def fire(self) -> None:
        """See whether the client reads again."""
        if self._stalled_since_nanos is None or self.finished.done():
            return
        now_nanos = self.server.now_nanos()
        if not self.transport.get_write_buffer_size():
            self._stalled_since_nanos = None
            for choice in self._choices:
                if choice.is_holding:
                    choice.flush()
        elif now_nanos - self._stalled_since_nanos > self._slow_reader_nanos:
            self.server.statistics.slow_reader_drops += 1
            self.drop(by_reset=False)
        else:
            self.server.at(now_nanos + RETRY_NANOS, self)

    def _write(self, frame: str) -> None:
        if frame:
            self.transport.write(self.encode(frame))

    def _finish(self) -> None:
        if not self.finished.done():
            self.finished.set_result(None)


class StreamedChoice:
    """One choice's tokens on their way to the connection: a TokenSink."""

    def __init__(self, reply: StreamedReply, frames: ChoiceFrames, *, token_count: int, log_number: int) -> None:
        faults = reply.faults
        self._reply = reply
        self._transport = reply.transport
        self._encode = reply.encode
        self._frames = frames
        self._wall_nanos = reply.clock.wall_nanos
        self._last_index = token_count - 1
        self._log_number = log_number
        self._log = None if reply.log is None else reply.log.extend
        self._interval = faults.stream_interval
        self._fault_index = first_fault_index(faults)
        self._plain_end = self._fault_index if faults.stream_interval == 1 else 0
        """Tokens before this one leave alone, unless the client does not read."""
        self._held: list[int] = []
        """When each token was due that waits, because its chunk is not full or because the client does not read."""
        self._next_index = 0
        """Of the token after those."""
        self._failure: str | None = None
        self._has_ended = False
        self.ticket: Ticket | None = None
        """Set when the request is taken in."""
        reply.add(self)

    @property
    def is_holding(self) -> bool:
        """Whether tokens wait."""
        return bool(self._held)

    def on_tokens(self, first_index: int, count: int, due_nanos: int) -> None:
        """Write the tokens, or hold them back."""
        if 0 < first_index < self._plain_end and not self._held and count == 1:  # nearly always
            transport = self._transport
            if not transport.get_write_buffer_size():
                self._next_index = first_index + 1
                frame = self._encode(self._frames.tokens(first_index, 1))
                written_nanos = self._wall_nanos()
                transport.write(frame)
                if self._log is not None:
                    self._log((self._log_number, first_index, due_nanos, written_nanos, 1))
                return
        if first_index + count > self._fault_index:
            self._break()
            return
        if not first_index:
            self._reply.open()
        self._next_index = first_index + count
        self._held.extend([due_nanos] * count)
        if self._transport.get_write_buffer_size():
            self._reply.stall()
        elif len(self._held) >= self._interval or not first_index or self._next_index > self._last_index:
            self.flush()

    def on_end(self, failure: str | None) -> None:
        """Write what is held back, then the end."""
        self._has_ended = True
        self._failure = failure
        if self._held and self._transport.get_write_buffer_size():
            self._reply.stall()
        else:
            self.flush()

    def flush(self) -> None:
        """Write what is held back as one chunk."""
        held = self._held
        count = len(held)
        if count:
            first_index = self._next_index - count
            frame = self._encode(self._frames.tokens(first_index, count))
            written_nanos = self._wall_nanos()
            self._transport.write(frame)
            log = self._log
            if log is not None:
                number = self._log_number
                for offset, due_nanos in enumerate(held):
                    log((number, first_index + offset, due_nanos, written_nanos, count))
            held.clear()
        if self._has_ended:
            self._reply.end_choice(self._failure)

    def _break(self) -> None:
        """Do what the injected fault says."""
        reply, ticket = self._reply, self.ticket
        if ticket is None:
            return
        if reply.faults.out_of_memory_after == self._fault_index:
            reply.server.cancel(ticket, failure=OUT_OF_MEMORY)
        else:
            reply.server.cancel(ticket)
            reply.drop(by_reset=reply.faults.reset_after == self._fault_index)
