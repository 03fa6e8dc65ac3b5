"""Mixed precision (Micikevicius et al. 2018): its parts as switches, what they do made visible, TF32."""
