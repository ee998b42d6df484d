"""What the recommender knows at one moment: measurements, LLMs, GPUs, prices and a predictor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from llmpilot_perfmodel.gpu_catalogue import GpuCatalogue, GpuProfile
from llmpilot_perfmodel.llm_spec import LlmSpec
from llmpilot_perfmodel.memory import weights_memory
from llmpilot_perfmodel.prices import Price
from llmpilot_recommender.dataset import Dataset
from llmpilot_recommender.decision import Basis, CurvePoint, measured_point, predicted_points
from llmpilot_recommender.manifest import Manifest
from llmpilot_recommender.measured_llms import MeasuredLlm
from llmpilot_recommender.measurement import Measurement, Origin
from llmpilot_recommender.predictor import Predictor


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Latencies of one LLM on one GPU profile over concurrent users, ascending."""

    points: tuple[CurvePoint, ...]
    basis: Basis
    fits_in_memory: bool
    memory_explanation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Knowledge:
    """An immutable snapshot; a new measurement makes a new one."""

    dataset: Dataset
    llms: Mapping[str, MeasuredLlm]
    """The measured LLMs by name."""
    catalogue: GpuCatalogue
    prices: Mapping[str, Price]
    predictor: Predictor
    manifest: Manifest
    """What is known of the predictor."""

    def with_measurement(self, measurement: Measurement, spec: LlmSpec | None) -> "Knowledge":
        """Return the knowledge after one more measurement; a simulation replaces no measurement."""
        llms = dict(self.llms)
        if known := self.measured_llm(measurement.llm):
            measurement = replace(measurement, llm=known.name)
        elif spec is not None:
            llms[measurement.llm] = MeasuredLlm(name=measurement.llm, aliases=(), spec=spec)
        replaced = self.dataset.measurement(measurement.key)
        if measurement.origin is Origin.SIMULATED and replaced and replaced.origin is not Origin.SIMULATED:
            return self
        return replace(self, dataset=self.dataset.with_measurement(measurement), llms=llms)

    def measured_llm(self, name: str) -> MeasuredLlm | None:
        """Return the measured LLM of this name or alias."""
        if name in self.llms:
            return self.llms[name]
        return next((llm for llm in self.llms.values() if name in llm.aliases), None)

    def characterized_profiles(self) -> tuple[GpuProfile, ...]:
        """Return the profiles of the catalogue on which measurements were made."""
        return tuple(
            profile for profile in map(self.catalogue.profile, self.dataset.gpu_profiles) if profile is not None
        )

    def curves(self, name: str, spec: LlmSpec, profiles: Sequence[GpuProfile]) -> list[Curve]:
        """Return one curve per profile: measured where this LLM was measured, else predicted."""
        llm = self.measured_llm(name)
        measured = [self.dataset.curve(llm.name if llm else name, profile.name) for profile in profiles]
        unmeasured = [profile for profile, rows in zip(profiles, measured, strict=True) if not rows]
        predicted = iter(self._predicted(spec, unmeasured) if unmeasured else ())
        return [_measured_curve(rows) if rows else next(predicted) for rows in measured]

    def _predicted(self, spec: LlmSpec, profiles: Sequence[GpuProfile]) -> list[Curve]:
        latencies = self.predictor.predict(spec, profiles).tolist()
        known = self._characterized_gpus()
        curves = []
        for profile, rows in zip(profiles, latencies, strict=True):
            memory = weights_memory(spec, profile)
            curves.append(
                Curve(
                    points=predicted_points(self.predictor.users_counts, rows),
                    basis=Basis.PREDICTED if profile.gpu.name in known else Basis.EXTRAPOLATED,
                    fits_in_memory=memory.fits,
                    memory_explanation=memory.explanation,
                )
            )
        return curves

    def _characterized_gpus(self) -> frozenset[str]:
        return frozenset(profile.gpu.name for profile in self.characterized_profiles())


def _measured_curve(rows: Sequence[Measurement]) -> Curve:
    """Return the measured loads as a curve; simulated ones only where nothing was measured."""
    measured = [row for row in rows if row.origin is not Origin.SIMULATED]
    return Curve(
        points=tuple(map(measured_point, measured or rows)),
        basis=Basis.MEASURED if measured else Basis.SIMULATED,
        fits_in_memory=True,
        memory_explanation="it ran there",
    )
