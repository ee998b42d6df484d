"""Between protobuf and domain, of a model's statistics."""

from itertools import combinations

from llmpilot.workload.v1 import workload_pb2 as pb
from llmpilot_workload_generator.model import Kind
from llmpilot_workload_generator.model_store import StoredModel
from llmpilot_workload_generator.statistics import Description, Marginal
from llmpilot_workload_generator.wire import write_model


def write_description(description: Description, model: StoredModel) -> pb.DescribeWorkloadModelResponse:
    """Return a model's statistics as a client sees them."""
    pairs = combinations(enumerate(description.marginals), 2)
    return pb.DescribeWorkloadModelResponse(
        workload_model=write_model(model),
        marginals=[_write_marginal(marginal) for marginal in description.marginals],
        correlations=[
            pb.Correlation(parameter=one.name, other_parameter=other.name, spearman=description.spearman[row][column])
            for (row, one), (column, other) in pairs
            if Kind.CATEGORY not in {one.kind, other.kind}
        ],
        entropy_bits=description.entropy_bits,
        total_correlation_bits=description.total_correlation_bits,
    )


def _write_marginal(marginal: Marginal) -> pb.Marginal:
    rows = zip(
        marginal.lows.tolist(),
        marginal.highs.tolist(),
        marginal.centres.tolist(),
        marginal.counts.tolist(),
        strict=True,
    )
    return pb.Marginal(
        parameter=marginal.name,
        bins=[pb.Bin(low=low, high=high, centre=centre, count=count) for low, high, centre, count in rows],
        entropy_bits=marginal.entropy_bits,
        median=marginal.median,
        p90=marginal.p90,
        p99=marginal.p99,
    )
