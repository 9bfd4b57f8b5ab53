"""Commands around a run: generate, inspect, measure."""

from research import environment

environment.prepare()  # before any of them imports JAX
