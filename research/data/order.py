"""Random order that never changes: not with numpy's version, the machine, or the number of processes."""

import hashlib

import numpy as np


def bits(count: int, *key: str | int) -> np.ndarray:
    """`count` uniform uint64, a pure function of the key.

    Philox's raw output is part of numpy's compatibility promise; the methods of `Generator` aren't.
    """
    digest = hashlib.sha256("\0".join(map(str, key)).encode("utf-8", "surrogateescape")).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "big")).random_raw(count)


def permutation(count: int, *key: str | int) -> np.ndarray:
    """A permutation of range(count), int64, a pure function of the key."""
    return np.argsort(bits(count, *key), kind="stable")
