"""Starts work on Ray, and only this package does: the cluster, training, ingestion, the command's services."""
