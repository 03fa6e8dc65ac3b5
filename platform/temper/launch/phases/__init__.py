"""`temper phases`: what is in the phase store, why a phase was computed again, and how room is made there."""
