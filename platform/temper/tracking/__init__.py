"""What happened: the durable history of a run, its delivery to MLflow, the display for people."""
