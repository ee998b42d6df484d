"""What makes a process a service: settings, gRPC server and client, errors, NATS, health, logs, metrics."""
