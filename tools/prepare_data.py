"""Fills the cache with a preset's data ahead of a run: `python -m tools.prepare_data --config=NAME [--set k=v]...`

A run with the same data settings then tokenises nothing and trains no vocabulary; it still reads the corpus once, which
tells that it is the same. A job that was killed goes on where it was: finished parts aren't tokenised again. SentencePiece
and `tokenizers` encode on every core. `--json` prints tokens, bytes (of text) and documents of one pass over the training
split, the corpus hash, seconds, the same for each part of the mixture, and the rows of each evaluation set.
"""

import dataclasses
import time

from absl import flags

from experiments import command_line
from research.data import pipeline

command_line.define_config_flags()
command_line.define_json_flag()
flags.adopt_module_key_flags(command_line)
FLAGS = flags.FLAGS


def main(_: list[str]) -> int:
    config, _ = command_line.configured()
    start = time.monotonic()
    prepared = pipeline.prepare(config.data, config.model.vocab_size, config.seed)
    seconds = time.monotonic() - start
    report = {
        "tokens": prepared.train_tokens, "bytes": prepared.train_bytes,
        "documents": sum(part.documents for part in prepared.parts), "hash": prepared.corpus_hash, "seconds": seconds,
        "rows": sum(len(rows) for rows in prepared.train), "vocab_size": prepared.tokenizer.vocab_size,
        "tokenizer": prepared.tokenizer.fingerprint(),
        "parts": [{**dataclasses.asdict(part), "rows": len(rows), "weight": _now(weight)}
                  for part, rows, weight in zip(prepared.parts, prepared.train, prepared.weights)],
        "validation": {name: len(rows) for name, rows in prepared.validation.items()}}
    if FLAGS.json:
        command_line.print_json(report)
        return 0
    for part in report["parts"]:
        skipped = f", {part['skipped']} bad rows left out of its source" if part["skipped"] else ""
        print(f"{part['name']}: {part['documents']:,} documents, {part['bytes'] / 1e6:,.1f} MB, "
              f"{part['tokens']:,} tokens, {part['rows']:,} rows, weight {part['weight']:.4g}, "
              f"{part['held_out']:,} documents held out{skipped}")
    print(f"in all: {report['tokens']:,} tokens of {report['bytes'] / 1e6:,.1f} MB, corpus {report['hash'][:12]}, "
          f"{seconds:.1f} s; the cache is {config.data.cache_dir}")
    return 0


def _now(weight: pipeline.Weight) -> float:
    """At the first sample."""
    return weight if isinstance(weight, float) else weight[0][1]


if __name__ == "__main__":
    command_line.run(main)
