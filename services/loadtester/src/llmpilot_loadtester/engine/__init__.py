"""What sends: a Locust process with sockets of its own. Runs in worker processes and in locustfiles only."""
