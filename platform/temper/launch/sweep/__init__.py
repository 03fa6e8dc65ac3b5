"""`temper sweep`: many trials of one job, searched and scheduled by Ray Tune, on worker groups that outlive them.

    driver ──Tune──▶ TrialProxy (one a running trial) ──▶ Coordinator ──tasks──▶ worker groups (Ray Train)
                                        results ◀──────────────┘  ◀──reports──┘

The coordinator decides what is computed by whom; nothing that the phase store has is computed again.
"""
