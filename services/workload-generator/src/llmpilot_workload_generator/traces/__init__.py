"""Traces: requests that were really sent, read as columns in batches from whatever files hold them."""
