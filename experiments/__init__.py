"""What people run: training, sweeps, experiments."""

from research import environment

environment.prepare()  # before any of them imports JAX
