"""Solvers: small rules for going from one noise level to the next. Each belongs to one run."""
