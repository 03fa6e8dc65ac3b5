"""The plan: everything about a run that can be decided before it starts, as plain data. No torch, no ray."""
