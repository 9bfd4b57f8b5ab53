"""What people run: training, sweeps, experiments."""

import time

from research import environment

BEGAN = time.monotonic()  # the process, nearly: nothing large has been imported yet
environment.prepare()  # before any of them imports JAX
