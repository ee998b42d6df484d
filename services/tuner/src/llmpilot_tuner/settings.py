"""The tuner's settings, from the environment."""

from pydantic import Field

from llmpilot_servicekit.settings import ServiceSettings


class TunerSettings(ServiceSettings):
    """`LLMPILOT_...` variables beside those every service has."""

    max_tunings: int = Field(default=1, gt=0, le=64)
    """LLMPILOT_MAX_TUNINGS: tunings that run here at once. One that measures needs the GPU alone. Others wait."""
    take_over_seconds: float = Field(default=10, ge=1, allow_inf_nan=False)
    """LLMPILOT_TAKE_OVER_SECONDS: how long a tuning's owner is silent before another process goes on with it."""
