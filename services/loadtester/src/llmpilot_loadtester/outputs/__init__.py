"""What people and tools read of a load test: tables, files, reports."""
