"""Jobs that outlive a call and the process that runs them: kept in JetStream, run by one process at a time."""
