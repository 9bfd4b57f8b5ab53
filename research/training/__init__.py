"""One loop, many objectives: state, optimizers, metrics, checkpoints."""
