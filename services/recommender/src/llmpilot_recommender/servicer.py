"""RPC in, domain call, RPC out. Answers from memory only, so a dead NATS or disk does not stop it."""

from functools import partial

from google.protobuf.message import Message
from grpc.aio import ServicerContext

from llmpilot.measurement.v1.measurement_pb2 import MeasurementRecorded
from llmpilot.recommendation.v1 import recommendation_pb2 as pb
from llmpilot.recommendation.v1.recommendation_pb2_grpc import (
    RecommendationServiceServicer,
    add_RecommendationServiceServicer_to_server,
)
from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_recommender import wire
from llmpilot_recommender.dataset_file import violations_of
from llmpilot_recommender.knowledge import Knowledge
from llmpilot_recommender.recommendation import recommend
from llmpilot_recommender.wire_measurement import read_measurement_recorded
from llmpilot_servicekit.server import Registration


class RecommendationServicer(RecommendationServiceServicer):
    """Serves the current knowledge. A call takes a millisecond of CPU, so it runs on the event loop."""

    def __init__(self, knowledge: Knowledge) -> None:
        self._knowledge = knowledge

    def facts(self) -> dict[str, object]:
        """Return what this replica answers from, for the log."""
        knowledge = self._knowledge
        return {
            "dataset_version": knowledge.dataset.version,
            "measurements": len(knowledge.dataset.measurements),
            "model": knowledge.manifest.name,
        }

    def registration(self) -> Registration:
        """Return how a server takes this servicer."""
        service = pb.DESCRIPTOR.services_by_name["RecommendationService"]
        return Registration(
            service_name=service.full_name, add=partial(add_RecommendationServiceServicer_to_server, self)
        )

    async def learn(self, event: Message, sequence: int) -> None:  # noqa: ARG002 the order alone matters
        """Add one measurement; raises InvalidInputError when it breaks the schema or names an unknown GPU profile."""
        if not isinstance(event, MeasurementRecorded):
            raise TypeError(f"expected MeasurementRecorded, got {type(event).__name__}")
        measurement, spec = read_measurement_recorded(event)
        violations = list(violations_of(measurement))
        if self._knowledge.catalogue.profile(measurement.gpu_profile) is None:
            violations.append(
                Violation("measurement.gpu_profile", f"{measurement.gpu_profile!r} is not in the catalogue")
            )
        if spec is not None:
            violations.extend(Violation(f"llm_spec.{v.field}", v.description) for v in spec.violations())
        if violations:
            raise InvalidInputError(violations)
        self._knowledge = self._knowledge.with_measurement(measurement, spec)

    async def Recommend(  # noqa: N802 named by the proto
        self,
        request: pb.RecommendRequest,
        context: ServicerContext[pb.RecommendRequest, pb.RecommendResponse],  # noqa: ARG002
    ) -> pb.RecommendResponse:
        """Rank the deployments that meet the limits."""
        knowledge = self._knowledge
        question = wire.read_recommend_request(request, knowledge)
        return wire.write_recommend_response(recommend(question, knowledge), question, knowledge)

    async def Predict(  # noqa: N802
        self,
        request: pb.PredictRequest,
        context: ServicerContext[pb.PredictRequest, pb.PredictResponse],  # noqa: ARG002
    ) -> pb.PredictResponse:
        """Give one latency curve."""
        knowledge = self._knowledge
        name, spec, profile = wire.read_predict_request(request, knowledge)
        (curve,) = knowledge.curves(name, spec, [profile])
        return wire.write_predict_response(curve, knowledge)

    async def ListGpuProfiles(  # noqa: N802
        self,
        request: pb.ListGpuProfilesRequest,
        context: ServicerContext[pb.ListGpuProfilesRequest, pb.ListGpuProfilesResponse],  # noqa: ARG002
    ) -> pb.ListGpuProfilesResponse:
        """List the catalogue."""
        knowledge = self._knowledge
        profiles = knowledge.catalogue.profiles()
        page, next_page_token = wire.read_page(request.page_size, request.page_token, len(profiles))
        return pb.ListGpuProfilesResponse(
            gpu_profiles=[wire.write_gpu_profile(profile, knowledge) for profile in profiles[page]],
            next_page_token=next_page_token,
        )

    async def ListModels(  # noqa: N802
        self,
        request: pb.ListModelsRequest,
        context: ServicerContext[pb.ListModelsRequest, pb.ListModelsResponse],  # noqa: ARG002
    ) -> pb.ListModelsResponse:
        """List the loaded model."""
        models = [wire.write_model(self._knowledge.manifest)]
        page, next_page_token = wire.read_page(request.page_size, request.page_token, len(models))
        return pb.ListModelsResponse(models=models[page], next_page_token=next_page_token)
