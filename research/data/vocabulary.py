"""What all tokenizers share: the specials and the files that a run keeps."""

import json
import pathlib

SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", "<mask>")
PAD, BOS, EOS, UNK, MASK = range(5)
CHAT_MARKERS = ("<|user|>", "<|assistant|>", "<|end|>")  # ids 5 to 7 of a vocabulary that was trained with them
DESCRIPTION, MODEL = "tokenizer.json", "tokenizer.model"


def save_model(
    directory: str | pathlib.Path, name: str, vocab_size: int, fingerprint: str, model: bytes
) -> None:
    """Writes tokenizer.json and tokenizer.model into `directory`, made if needed."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MODEL).write_bytes(model)
    description = {"name": name, "vocab_size": vocab_size, "specials": list(SPECIALS),
                   "fingerprint": fingerprint}
    (directory / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def resize(size: int, direction: str, name: str) -> str:
    """The cure for a vocabulary of the wrong size."""
    return f"set model.vocab_size={size} or {direction} (or data.tokenizer={name}:{size})"
