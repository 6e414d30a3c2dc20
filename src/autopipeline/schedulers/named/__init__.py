"""The public schedulers: a grid, a parameterisation and a solver under the names that checkpoints have."""
