"""The library: models, data, training, decoding. Imports kernels; never configs, experiments or tools."""
