"""A worker process: `python -m llmpilot_tuner.torch_worker`, spoken to by `llmpilot_tuner.probes.worker_process`."""

import sys

from llmpilot_tuner.domain.probing import ProbeKind
from llmpilot_tuner.probes.worker_messages import Order
from llmpilot_tuner.torch_worker.serving import Meter, serve


def meter_for(order: Order) -> Meter:
    """Return what runs the batches of an order; only what it needs is imported."""
    match order.kind:
        case ProbeKind.DRY:
            from llmpilot_tuner.torch_worker.meter_dry import DryMeter  # noqa: PLC0415 as said above

            return DryMeter(order)
        case ProbeKind.CPU:
            from llmpilot_tuner.torch_worker.meter_cpu import CpuMeter  # noqa: PLC0415

            return CpuMeter(order)
        case ProbeKind.TORCH:
            from llmpilot_tuner.torch_worker.meter_cuda import CudaMeter  # noqa: PLC0415

            return CudaMeter(order)
        case _:
            raise ValueError(f"a {order.kind} probe has no worker")


if __name__ == "__main__":
    sys.exit(serve(meter_for))
