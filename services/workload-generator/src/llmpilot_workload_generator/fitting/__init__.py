"""From a trace to a workload model: sketches, bins, counts, and models added up."""
