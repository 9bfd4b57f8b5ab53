"""Work that the backward pass does again, where that costs one pass over what it would have to keep instead."""

import functools

import jax

# remade(run)(*arguments): of run, the backward pass keeps the arguments alone. Layers are scanned: the loop's own boundary
# keeps XLA from merging the two, and barriers (prevent_cse) would only keep it from fusing.
remade = functools.partial(jax.checkpoint, prevent_cse=False)
