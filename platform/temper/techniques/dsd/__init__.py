"""Dense-sparse-dense training (Han et al., ICLR 2017): masks, the borders between phases, what came of the weights."""
