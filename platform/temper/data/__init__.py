"""Data: where examples come from (sources, download) and in which order and form a rank gets them (batches)."""
