"""What was measured stays measured: every table under docs/results has the hash that it was committed with."""

import hashlib
import pathlib

RESULTS = pathlib.Path(__file__).parents[1] / "docs" / "results"


def test_every_table_has_its_hash():
    listed = dict(reversed(line.split()) for line in (RESULTS / "SHA256SUMS").read_text().splitlines())
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in RESULTS.iterdir()
             if path.name not in ("SHA256SUMS", "README.md")}
    assert found == listed


def test_every_table_is_explained():
    text = (RESULTS / "README.md").read_text()
    assert all(f"| {path.name} |" in text for path in RESULTS.iterdir() if path.name not in ("SHA256SUMS", "README.md"))
