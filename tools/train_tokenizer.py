"""Trains a tokenizer: `python -m tools.train_tokenizer --config=NAME --kind=bpe --vocab_size=4096 --output=DIR`

On the training documents of a preset's sources (--config, --set), or of text files (--paths). The directory is used
with `--set data.tokenizer=DIR`. Kinds: bpe and unigram (SentencePiece), wordpiece (of `tokenizers`, the extra hf); all
are lossless. Ids 0 to 4 are <pad> <s> </s> <unk> <mask>; with --chat, 5 to 7 are <|user|> <|assistant|> <|end|>.
"""

import pathlib
import time

from absl import flags

from experiments import command_line
from research.data import documents, pipeline
from research.data.tokenizer import Tokenizer
from research.data.vocabulary import DESCRIPTION
from research.errors import InputError
from research.schema import DataConfig, Source

KINDS = {"bpe": "sentencepiece", "unigram": "unigram", "wordpiece": "wordpiece"}
_MEASURED_DOCUMENTS = 200

command_line.define_config_flags()
command_line.define_json_flag()
flags.DEFINE_multi_string("paths", [], "Text files or globs to train on, in place of a preset's sources. Repeatable.")
flags.DEFINE_enum("kind", "bpe", list(KINDS), "Which kind of vocabulary.")
flags.DEFINE_integer("vocab_size", None, "How many ids; default: the preset's model.vocab_size.", lower_bound=1)
flags.DEFINE_string("output", None, "Directory for the tokenizer; made if missing.")
flags.DEFINE_boolean("chat", False, "With the chat markers <|user|> <|assistant|> <|end|>.")
flags.DEFINE_integer("sample_bytes", pipeline.TOKENIZER_SAMPLE_BYTES, "Train on at most so much text.", lower_bound=1)
flags.adopt_module_key_flags(command_line)
FLAGS = flags.FLAGS


def main(_: list[str]) -> int:
    if not FLAGS.output:
        raise InputError("--output", "is missing", "name a directory for the tokenizer")
    output = pathlib.Path(FLAGS.output).expanduser()
    if (output / DESCRIPTION).exists():
        raise InputError("--output", f"{FLAGS.output} holds a tokenizer already", "name another directory")
    if bool(FLAGS.paths) == bool(FLAGS.config):
        raise InputError("--config", "give either --config or --paths", "e.g. --paths='notes/**/*.txt'")
    if FLAGS.paths:
        if FLAGS["set"].value:
            raise InputError("--set", "changes a preset, and there is none", "give --config")
        data, vocab_size = DataConfig((Source("text", {"paths": tuple(FLAGS.paths)}),), holdout=0.0), FLAGS.vocab_size
        if vocab_size is None:
            raise InputError("--vocab_size", "is missing", "e.g. --vocab_size=4096")
    else:
        config, _ = command_line.configured()
        data, vocab_size = config.data, FLAGS.vocab_size or config.model.vocab_size
    start = time.monotonic()
    tokenizer = pipeline.train_tokenizer(
        data, KINDS[FLAGS.kind], vocab_size, chat=FLAGS.chat, sample_bytes=FLAGS.sample_bytes)
    seconds = time.monotonic() - start
    try:
        tokenizer.save(output)
    except OSError as error:
        raise InputError("--output", f"{FLAGS.output} can't be written ({error.strerror})",
                         "name another directory") from None
    size, split = bytes_per_token(data, tokenizer)
    report = {"kind": FLAGS.kind, "vocab_size": tokenizer.vocab_size, "chat_ids": tokenizer.chat_ids,
              "fingerprint": tokenizer.fingerprint(), "bytes_per_token": size, "measured_on": split,
              "output": FLAGS.output, "seconds": seconds}
    if FLAGS.json:
        command_line.print_json(report)
        return 0
    print(f"{FLAGS.kind} of {tokenizer.vocab_size} in {FLAGS.output}: {size:.2f} bytes a token on {split} documents\n"
          f"use it: --set data.tokenizer={FLAGS.output} --set model.vocab_size={tokenizer.vocab_size}")
    return 0


def bytes_per_token(data: DataConfig, tokenizer: Tokenizer) -> tuple[float, str]:
    """(bytes a token, "validation" or "train"): of some held-out documents, else of training ones."""
    sources = pipeline.make_sources(data.sources, "data.sources", data.cache_dir)
    for split in ("validation", "train"):
        texts = []
        for source in sources:
            names = (source.document_id(i) for i in range(len(source)))
            found = [i for i, name in enumerate(names) if documents.split(name, data.holdout) == split]
            texts += [source.document(i).text for i in found[:_MEASURED_DOCUMENTS]]
        if texts:
            break
    tokens = sum(map(len, tokenizer.encode_batch(texts)))
    return sum(len(text.encode("utf-8")) for text in texts) / tokens, split


if __name__ == "__main__":
    command_line.run(main)
