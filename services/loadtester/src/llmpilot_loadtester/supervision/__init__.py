"""What drives the workers: starts them, feeds them requests, takes their records, sees when one dies."""
