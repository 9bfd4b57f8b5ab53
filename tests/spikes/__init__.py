"""Test-only mixers: what later families will need of the contracts, each tiny. Importing this adds them to
MIXERS.

The package is imported by tests/conftest.py, so that every test process sees the same table, and stays out of
the library: `research.models.mixers` knows nothing of it.
"""

from research.models.mixers import MIXERS, Mixer
from tests.spikes.pallas_scale import PallasScale, PallasScaleMixer
from tests.spikes.recurrence import LinearRecurrence, LinearRecurrenceMixer
from tests.spikes.value_residual import ValueResidual, ValueResidualMixer

SPIKES = {
    "LinearRecurrence": Mixer(LinearRecurrence, LinearRecurrenceMixer),
    "PallasScale": Mixer(PallasScale, PallasScaleMixer),
    "ValueResidual": Mixer(ValueResidual, ValueResidualMixer),
}

for name in SPIKES:
    if name in MIXERS:
        raise ValueError(f"tests.spikes: {name} is in the library now; delete the spike and keep its cases")
MIXERS.update(SPIKES)
