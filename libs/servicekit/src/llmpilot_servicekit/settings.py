"""The settings every service has, read from environment variables.

Invariant: a wrong environment is reported whole, one violation per variable.
"""

import os
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_servicekit.address import split_address

_environment: ContextVar[Mapping[str, str] | None] = ContextVar("environment", default=None)


def _checked_address(address: str) -> str:
    split_address(address)
    return address


def _checked_nats_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in {"nats", "tls", "ws", "wss"} or not parts.hostname or parts.port is None:
        raise ValueError("must be a URL like nats://127.0.0.1:4222")
    return url


Address = Annotated[str, AfterValidator(_checked_address)]
"""A "host:port" where port 0 means any free one."""


class _Environment(EnvSettingsSource):
    """The variables of `load_settings`, or those of the process."""

    def __init__(self, settings_cls: type[BaseSettings]) -> None:
        super().__init__(settings_cls)
        environ = _environment.get()
        variables = os.environ if environ is None else environ
        self.env_vars = {name.lower(): value for name, value in variables.items() if value != ""}

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        try:
            return super().decode_complex_value(field_name, field, value)
        except ValueError:
            return value  # not JSON: validation reports it beside every other violation


class ServiceSettings(BaseSettings):
    """Settings of a service. A service adds its own fields in a subclass; an empty variable counts as unset."""

    model_config = SettingsConfigDict(env_prefix="LLMPILOT_", frozen=True, extra="ignore")

    listen: Address = "127.0.0.1:50051"
    """Where gRPC listens."""
    metrics_listen: Address = "127.0.0.1:0"
    """Where Prometheus scrapes."""
    nats_url: Annotated[str, AfterValidator(_checked_nats_url)] = "nats://127.0.0.1:4222"
    address_file: Path | None = None
    """File that holds the real addresses as JSON while the service serves."""
    address_folder: Path | None = None
    """Folder in which the services of this machine write NAME.addresses.json; see `neighbours`."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "json", "console"] = "auto"
    """auto: console on a terminal, JSON lines elsewhere."""
    shutdown_grace_seconds: float = Field(default=5, ge=0, allow_inf_nan=False)
    """How long calls in flight may go on after SIGTERM."""
    max_request_bytes: int = Field(default=4 * 1024 * 1024, gt=0, lt=2**31)
    default_deadline_seconds: float = Field(default=30, gt=0, allow_inf_nan=False)
    """Limit of a unary call whose client set no deadline."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003 the library's signature
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read arguments, then the environment, nothing else."""
        return init_settings, _Environment(settings_cls)


S = TypeVar("S", bound=ServiceSettings)


def load_settings(cls: type[S], environ: Mapping[str, str] | None = None) -> S:
    """Read settings from `environ` (None: the process's); InvalidInputError names every wrong variable."""
    token = _environment.set(environ)
    try:
        return cls()
    except ValidationError as error:
        prefix = cls.model_config.get("env_prefix", "")
        raise InvalidInputError(_violation(prefix, dict(detail)) for detail in error.errors()) from error
    finally:
        _environment.reset(token)


def _violation(prefix: str, detail: Mapping[str, Any]) -> Violation:
    message = str(detail["msg"]).removeprefix("Value error, ").replace("Input should", "must", 1)
    if not detail["loc"]:
        return Violation(f"{prefix}*", message)
    name, *inner = map(str, detail["loc"])
    field = ".".join([f"{prefix}{name}".upper(), *inner])
    return Violation(field, "must be set" if detail["type"] == "missing" else f"{message}, is {detail['input']!r}")
