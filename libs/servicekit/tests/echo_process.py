"""A service of its own process: answers "slow" only after it has been told to stop, "stuck" never."""

import asyncio
import sys
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.wrappers_pb2 import StringValue

from llmpilot_contracts.errors import UnavailableError
from llmpilot_servicekit.logs import configure_logs
from llmpilot_servicekit.server import Registration, run, serve
from llmpilot_servicekit.settings import ServiceSettings, load_settings


async def main(mode: str, entered_file: Path) -> None:
    settings = load_settings(ServiceSettings)
    configure_logs(settings)
    stop = asyncio.Event()

    async def answer(request: StringValue, _context: Any) -> StringValue:
        entered_file.touch()  # noqa: ASYNC240 a moment
        await (stop if request.value == "slow" else asyncio.Event()).wait()
        return StringValue(value=f"{request.value} answered")

    async def fail() -> None:
        raise UnavailableError("the store is gone: mount it again")

    async def idle() -> None:
        await asyncio.Event().wait()

    handler = grpc.unary_unary_rpc_method_handler(answer, StringValue.FromString, StringValue.SerializeToString)
    generic = grpc.method_handlers_generic_handler("test.Echo", {"unary_unary": handler})
    await serve(
        settings,
        registrations=[Registration("test.Echo", lambda server: server.add_generic_rpc_handlers((generic,)))],
        background=[fail if mode == "failing" else idle],
        stop=stop,
    )


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1], Path(sys.argv[2]))))
