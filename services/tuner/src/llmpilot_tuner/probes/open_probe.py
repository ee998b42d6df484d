"""Which prober a plan is run with."""

from llmpilot_tuner.domain.plan import Plan
from llmpilot_tuner.domain.probing import ProbeKind, Prober
from llmpilot_tuner.probes.analytic_probe import AnalyticProber
from llmpilot_tuner.probes.torch_probe import TorchProber


def open_probe(plan: Plan) -> Prober:
    """Return the prober of a plan, to be entered; a server probe is none."""
    if plan.spec.probe is ProbeKind.ANALYTIC:
        return AnalyticProber(plan.spec.capacity_bytes, plan.predict)
    return TorchProber(plan.spec, plan.config, plan.execution)
