"""The load tester's settings, from the environment."""

from pydantic import Field

from llmpilot_servicekit.settings import Address, ServiceSettings


class LoadTesterSettings(ServiceSettings):
    """`LLMPILOT_...` variables beside those every service has."""

    max_load_tests: int = Field(default=1, gt=0, le=64)
    """LLMPILOT_MAX_LOAD_TESTS: load tests that run here at once; they take CPU from each other. Others wait."""
    take_over_seconds: float = Field(default=10, ge=1, allow_inf_nan=False)
    """LLMPILOT_TAKE_OVER_SECONDS: how long a load test's owner is silent before another process goes on with it."""
    workload_generator_address: Address | None = None
    """LLMPILOT_WORKLOAD_GENERATOR_ADDRESS: unset: the one that runs on this machine."""
    max_request_bytes: int = Field(default=64 * 1024 * 1024, gt=0, lt=2**31)
    """LLMPILOT_MAX_REQUEST_BYTES: files of prompts and tokenizers are big."""
