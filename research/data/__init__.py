"""Documents to batches: sources, tokenizers, packing, the global order, reading ahead."""
