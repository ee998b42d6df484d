"""The workload generator: fits workload models to traces of requests, stores them, and draws requests from them."""
