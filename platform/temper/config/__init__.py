"""The job: a strict, frozen, typed schema; YAML and dotted overrides; checks across sections. No torch, no ray."""
