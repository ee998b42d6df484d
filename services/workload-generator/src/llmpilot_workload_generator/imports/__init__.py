"""Models that others published, turned into ours."""
