"""The Locust user for anyone's locustfile, timed by the kernel and as cheap as our own runs.

    from locust import task
    from llmpilot_loadtester.engine.user import LlmUser

    class Chat(LlmUser):
        protocol = "openai-chat"

        @task
        def ask(self):
            self.client.generate({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64})

Locust's tables show the requests, and their times to first token and between tokens as entries of their own. Invariant:
every request is told to Locust once, when its reply was parsed, which is when the event loop has time for it.
"""

import itertools
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from weakref import WeakKeyDictionary

import gevent
from gevent.lock import RLock
from locust import User, events
from locust.env import Environment
from locust.runners import Runner

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_contracts.record_schema import OK
from llmpilot_loadtester.domain.spec import Protocol, Target
from llmpilot_loadtester.engine.adapters import new_adapter_for
from llmpilot_loadtester.engine.client import Generation, LlmClient, request_body
from llmpilot_loadtester.engine.locust_records import collect_records, sink_of
from llmpilot_loadtester.engine.probe import probe
from llmpilot_loadtester.engine.reader import Reader
from llmpilot_loadtester.engine.recorder import EndedRequest, Recorder
from llmpilot_loadtester.protocols.reply import ProtocolAdapter

_FLUSH_SECONDS = 0.1
_PROCESS_ID = f"locust-{uuid.uuid4().hex[:12]}"


class RequestError(Exception):
    """What Locust is told of a request that failed."""


class LlmUser(User):
    """A user of an LLM inference server. The target is Locust's host, with a path prefix if there is one."""

    abstract = True
    protocol: str = Protocol.OPENAI_COMPLETIONS.value
    """openai-completions, openai-chat, tgi or tgis."""
    served_model: str = ""
    """Empty: asked from the server."""
    api_key: str = ""
    headers: Mapping[str, str] = {}
    ca_certificates_pem: str = ""
    insecure: bool = False
    request_timeout_seconds: float = 600.0
    connect_timeout_seconds: float = 10.0

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        run = _runs.get(environment)
        if run is None:
            run = _runs[environment] = _Run(environment)
        self.client = UserClient(self, run)

    def on_stop(self) -> None:
        """Close the connection; who overrides this calls it."""
        self.client.close()

    def target(self) -> Target:
        """Return the target as the attributes say it; raises InvalidInputError."""
        url = self.host or ""
        scheme = ("grpc", "grpcs") if self.protocol == Protocol.TGIS else ("http", "https")
        violations = []
        if url.partition("://")[0] not in scheme:
            violations.append(Violation("host", f"must begin with {scheme[0]}:// or {scheme[1]}://, is {url!r}"))
        if self.protocol not in set(Protocol):
            violations.append(Violation("protocol", f"must be one of {', '.join(Protocol)}, is {self.protocol!r}"))
        if violations:
            raise InvalidInputError(violations)
        return Target(
            url=url,
            protocol=Protocol(self.protocol),
            served_model=self.served_model,
            api_key=self.api_key,
            headers=tuple(self.headers.items()),
            ca_certificates_pem=self.ca_certificates_pem,
            insecure=self.insecure,
            request_timeout_seconds=self.request_timeout_seconds,
            connect_timeout_seconds=self.connect_timeout_seconds,
        )


class UserClient:
    """Sends a user's requests."""

    def __init__(self, user: LlmUser, run: "_Run") -> None:
        self._user, self._run = user, run
        self._user_index = next(run.user_indices)
        self._target: Target | None = None
        self._client: LlmClient

    def generate(self, body: bytes | Mapping[str, object], *, name: str = "generate") -> Generation:
        """Send a request and wait for the end of its reply, whatever that is; nothing is raised for a failed one.

        body: of the protocol. In a mapping, model, stream and stream_options are filled in where absent.
        name: what Locust calls it. Raises InvalidInputError and TypeError for what is no request.
        """
        if self._target is None:
            self._target = self._run.known(self._user.target())
            self._client = self._run.open_client(self._target)
        content = body if isinstance(body, bytes) else request_body(self._target, body)
        return self._run.send(self._client, content, self._user_index, self._user, name)

    def close(self) -> None:
        """Give the connection back; the next request opens another one."""
        if self._target is not None:
            self._client.close()


class _Run:
    """What all users of a process share while Locust runs."""

    def __init__(self, environment: Environment) -> None:
        self.user_indices = itertools.count()
        self._environment = environment
        self._reader = Reader()
        self._recorder = Recorder(sink_of(environment), on_parsed=self._tell)
        self._request_indices = itertools.count()
        self._targets: dict[Target, Target] = {}
        self._asking = RLock()
        self._new_adapters: dict[Target, Callable[[], ProtocolAdapter]] = {}
        self._flushing = gevent.spawn(self._flush)

    def known(self, target: Target) -> Target:
        """Return the target with the name of its model, asked from the server once."""
        if target.served_model or target.protocol in {Protocol.TGI, Protocol.TGIS}:
            return target
        with self._asking:
            if target not in self._targets:
                served = probe(target, self._reader).served_models
                self._targets[target] = replace(target, served_model=served[0]) if served else target
        return self._targets[target]

    def open_client(self, target: Target) -> LlmClient:
        """Return a client of its own for one user."""
        if target not in self._new_adapters:
            self._new_adapters[target] = new_adapter_for(target)
        return LlmClient(target, self._new_adapters[target](), self._reader)

    def send(self, client: LlmClient, body: bytes, user_index: int, user: LlmUser, name: str) -> Generation:
        """Send a request and return what came of it."""
        index = next(self._request_indices)
        scheduled_nanos = time.time_ns()

        def record(generation: Generation) -> None:
            self._recorder.add(
                EndedRequest(
                    request_index=index,
                    user_index=user_index,
                    scheduled_nanos=scheduled_nanos,
                    input_tokens=-1,
                    generation=generation,
                    context=(user, name),
                )
            )

        return client.send(body, f"{_PROCESS_ID}-{index}", record)

    def finish(self) -> None:
        """Parse, tell and give away everything that ended."""
        self._recorder.drain()

    def _flush(self) -> None:
        while True:
            gevent.sleep(_FLUSH_SECONDS)
            self._recorder.flush()

    def _tell(self, ended: EndedRequest) -> None:
        user, name = ended.context
        generation = ended.generation
        if generation.status == "cancelled":
            return  # by the end of the run; Locust does not count such requests either
        error = None if generation.status == OK else RequestError(f"{generation.status}: {generation.error}")
        times: list[tuple[str, float | None, RequestError | None]] = [(name, generation.end_to_end_seconds, error)]
        if error is None:
            times += [(f"{name} TTFT", generation.ttft_seconds, None), (f"{name} ITL", generation.itl_seconds, None)]
        for entry, seconds, exception in times:
            if seconds is not None:
                self._environment.events.request.fire(  # type: ignore[no-untyped-call]
                    request_type=user.protocol,
                    name=entry,
                    response_time=seconds * 1e3,
                    response_length=sum(map(len, generation.raw.parts)) if entry == name else 0,
                    exception=exception,
                    context=user.context(),
                )


_runs: "WeakKeyDictionary[Environment, _Run]" = WeakKeyDictionary()


def _on_init(environment: Environment, runner: Runner, **_: object) -> None:
    def finish(**_: object) -> None:
        if environment in _runs:
            _runs[environment].finish()

    # Before the collector's own, which writes what there is.
    environment.events.test_stop.add_listener(finish)  # type: ignore[no-untyped-call]
    collect_records(environment, runner)


events.init.add_listener(_on_init)  # type: ignore[no-untyped-call]
