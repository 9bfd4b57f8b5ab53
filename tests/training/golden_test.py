"""The first steps of the debug preset, to four digits: a change of initialisation, data, objective or optimizer shows here."""

import numpy as np

from configs import preset
from research.config import override
from research.data import pipeline
from research.data.loader import Loader
from research.training.loop import put_batch
from research.training.state import init_state
from tests.training.common import one_device

# Made by this test's own program on jax 0.10.2; jax 0.12 gives the same (threefry and the order of data don't change).
LOSSES = (5.88841, 5.46376, 4.94414, 4.40598)
GRAD_NORMS = (13.33849, 13.52625, 4.77554, 3.81819)


def test_golden_first_steps(tmp_path):
    config = override(preset("debug"), {"data.cache_dir": str(tmp_path), "train.steps": 30})
    data = pipeline.prepare(config.data, config.model.vocab_size, config.seed, quiet=True)
    program = one_device(config)
    compiled = program.compile()
    state = init_state(program.model.init, program.optimizer, program.layout, config.seed)
    loader = Loader(data.train, data.weights, config.seed, config.train.batch_size)
    losses, norms = [], []
    for _, batch in zip(range(4), loader):
        state, metrics = compiled(state, None, put_batch(batch, program.layout.batch()))
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    loader.close()
    np.testing.assert_allclose(losses, LOSSES, rtol=1e-4)
    np.testing.assert_allclose(norms, GRAD_NORMS, rtol=1e-3)
