"""Small corpora for the data tests."""

import pathlib

import numpy as np

from research.data import vocabulary
from research.data.cache import TokenCache

WORDS = "def return self value for in range import numpy array shape (x, y): # a comment of 42".split()
# Everything that SentencePiece changes by default, or that could be taken for a special or a byte piece.
NASTY = (
    "", " ", "\n", "\t", "a", "  two  spaces  ", "line\r\nline\r\n",
    "def f(x):\n    return x\n\n\n\tif x:\n        pass\n",
    "\u2581", "\u2581\u2581 a\u2581b \u2581", "x\u2585y", "<s>", "</s><s><pad><unk><mask>", "<0x41><0xE2>",
    "\0", "a\0b\0",
    "\ufeffbom", "\U0001f600 \U0001f469\u200d\U0001f469\u200d\U0001f467", "e\u0301 \u0301\u0302",
    "\u00e9\u212b\ufb01\uff21",
    "\u4f60\u597d\uff0c\u4e16\u754c", "\u00a0\u2003\u3000\u200b\u2028\u2029\x0b\x0c\x85",
    "1234567890 3.14e-10", " " * 100,
    "\n" * 50, "a" * 5000, "\x7f\x01\x1b[0m", "\ufffd\U0010ffff", "trailing ", " leading",
)


def write_corpus(directory: pathlib.Path, files: int = 40, seed: int = 0) -> pathlib.Path:
    """`files` files of made-up lines, some in a subdirectory; returns the directory."""
    rng = np.random.default_rng(seed)
    (directory / "deep").mkdir(parents=True, exist_ok=True)
    for i in range(files):
        lines = [" ".join(rng.choice(WORDS, rng.integers(1, 9))) for _ in range(rng.integers(3, 30))]
        lines.insert(2, "")
        path = directory / ("deep" if i % 4 == 0 else ".") / f"{i:03d}.txt"
        path.write_bytes("\n".join([f"file {i}", *lines]).encode())
    return directory


def make_cache(directory: pathlib.Path, lengths: list[int]) -> TokenCache:
    """Documents <s> n n+1 ... </s> of these lengths (at least 2); every inner token is different."""
    (directory).mkdir(parents=True, exist_ok=True)
    tokens, first = [], 100
    for length in lengths:
        tokens += [vocabulary.BOS, *range(first, first + length - 2), vocabulary.EOS]
        first += length - 2
    np.array(tokens, "<u2").tofile(directory / "tokens.bin")
    offsets_D1 = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    return TokenCache(np.memmap(directory / "tokens.bin", "<u2", mode="r"), offsets_D1, 0, directory)
