"""Compiling a run's step for a TPU slice that isn't there, and reading what the compiler made of it."""
