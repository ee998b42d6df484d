"""The contracts of LLM-Pilot beside the protos: the table of NATS subjects and the schema of the dataset."""
