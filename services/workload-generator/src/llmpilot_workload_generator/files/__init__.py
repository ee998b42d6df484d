"""Workload models and edges as files."""
