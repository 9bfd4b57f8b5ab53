"""Tests; the tree mirrors the code. A package, so that two files may have one name."""
