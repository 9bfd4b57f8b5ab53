"""The battery that every tokenizer passes: lossless byte for byte, whatever the text."""

import functools
import pathlib
import sysconfig

import numpy as np
import pytest

from research.data import subwords, vocabulary
from research.data.tokenizer import TOKENIZERS, load_tokenizer, parse_spec
from research.errors import InputError
from tests.data.corpora import NASTY


@functools.cache
def stdlib_texts() -> dict[str, str]:
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    names = ("json/decoder.py", "textwrap.py", "argparse.py", "encodings/cp437.py", "html/entities.py",
             "this.py")
    return {name: (root / name).read_bytes().decode("utf-8") for name in names}


@functools.cache
def tokenizer(name: str):
    if name == "bytes":
        return TOKENIZERS[name]()
    return TOKENIZERS[name].train(list(stdlib_texts().values()), 1000)


def texts() -> list[str]:
    rng = np.random.default_rng(0)
    alphabet = [*" \n\t\r\0<>/s_01ab\u2581\u2585\u0301\u00e9\u4f60\U0001f600", "    ", "<s>", "def ", "\r\n"]
    return [*NASTY, *stdlib_texts().values(), *("".join(rng.choice(alphabet, 60)) for _ in range(300))]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_round_trip_is_byte_for_byte(name):
    found = tokenizer(name)
    for text, ids in zip(texts(), found.encode_batch(texts()), strict=True):
        assert ids.dtype == np.int32 and ids.ndim == 1
        assert found.decode_bytes(ids) == text.encode("utf-8"), repr(text[:80])
        assert found.decode(ids) == text
        assert int(found.token_bytes_V[ids].sum()) == len(text.encode("utf-8"))
        assert not len(ids) or (ids.min() >= len(vocabulary.SPECIALS) and ids.max() < found.vocab_size)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_batch_is_the_texts_one_by_one(name):
    found = tokenizer(name)
    for text, ids in zip(texts(), found.encode_batch(texts())):
        np.testing.assert_array_equal(ids, found.encode(text))
    assert found.encode_batch([]) == []


@pytest.mark.parametrize("name", TOKENIZERS)
def test_specials_come_first_and_decode_to_nothing(name):
    found = tokenizer(name)
    specials = [found.pad_id, found.bos_id, found.eos_id, found.unk_id, found.mask_id]
    assert specials == list(range(5)) and found.name == name
    assert found.token_bytes_V.shape == (found.vocab_size,) and found.token_bytes_V.dtype == np.int32
    assert found.token_bytes_V[:5].tolist() == [0] * 5 and (found.token_bytes_V[5:] > 0).all()
    ids = found.encode("hi").tolist()
    assert found.decode([1, 0, *ids, 4, 3, 2]) == "hi"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_character_cut_in_two_is_replaced(name):
    found = tokenizer(name)
    ids = found.encode("a\U0001f600")
    assert found.decode(ids[:-1]) == "a\ufffd"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_save_and_load_give_the_same(name, tmp_path):
    found = tokenizer(name)
    found.save(tmp_path / "new" / "tokenizer")
    loaded = load_tokenizer(tmp_path / "new" / "tokenizer")
    assert type(loaded) is type(found) and loaded.fingerprint() == found.fingerprint()
    text = stdlib_texts()["textwrap.py"]
    np.testing.assert_array_equal(loaded.encode(text), found.encode(text))


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_a_broken_tokenizer_is_refused(file, damage, tmp_path):
    tokenizer("sentencepiece").save(tmp_path)
    content = (tmp_path / file).read_bytes()
    if damage == "missing":
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    with pytest.raises(InputError, match="whole tokenizer"):
        load_tokenizer(tmp_path)


def test_training_is_deterministic_and_keeps_white_space_together():
    first = tokenizer("sentencepiece")
    again = TOKENIZERS["sentencepiece"].train(iter(stdlib_texts().values()), 1000)
    assert again.fingerprint() == first.fingerprint() and first.vocab_size == 1000
    assert len(first.encode("        ")) == 1  # a run of spaces
    assert len(first.encode("):\n")) == 1  # and the end of a line
    assert len(first.encode("2024")) == 4  # digits alone
    text = stdlib_texts()["argparse.py"]
    assert len(first.encode(text)) < 0.5 * len(text)


def test_long_texts_are_cut_at_lines_without_loss(monkeypatch):
    found = tokenizer("sentencepiece")
    monkeypatch.setattr(subwords, "_LONGEST", 200)
    text = stdlib_texts()["textwrap.py"] + "x" * 1000 + "\u2581" + "y" * 201
    assert found.decode_bytes(found.encode(text)) == text.encode()
    cut = list(subwords._parts(stdlib_texts()["textwrap.py"]))
    assert len(cut) > 10 and all(part.endswith("\n") for part in cut)


def test_a_vocabulary_that_the_corpus_cannot_fill_names_the_largest_that_works():
    with pytest.raises(InputError, match="larger than the corpus fills") as caught:
        TOKENIZERS["sentencepiece"].train(["the quick brown fox jumps over the lazy dog\n" * 3], 5000)
    assert caught.value.field == "data.tokenizer"
    largest = int(caught.value.cure.split("sentencepiece:")[1].rstrip(")"))
    assert largest < 5000
    assert TOKENIZERS["sentencepiece"].train(
        ["the quick brown fox jumps over the lazy dog\n" * 3], largest).vocab_size == largest


def test_a_vocabulary_too_small_for_the_characters_names_one_that_works():
    many = "".join(map(chr, range(0x4E00, 0x4F00)))
    with pytest.raises(InputError, match="too small") as caught:
        TOKENIZERS["sentencepiece"].train([many], 300)
    smallest = int(caught.value.cure.split("sentencepiece:")[1].rstrip(")"))
    assert TOKENIZERS["sentencepiece"].train([many * 2], smallest).vocab_size == smallest


@pytest.mark.parametrize("nothing", [[], [""], ["\t\0\t"]])
def test_training_on_nothing_says_so(nothing):
    with pytest.raises(InputError, match="no text"):
        TOKENIZERS["sentencepiece"].train(nothing, 300)


def test_parse_spec():
    assert parse_spec("bytes", 300) == ("bytes", 261)
    assert parse_spec("sentencepiece", 4096) == ("sentencepiece", 4096)
    assert parse_spec("sentencepiece:512", 4096) == ("sentencepiece", 512)
    for spec, words in (("byte", "did you mean bytes"), ("bytes:300", "fixed"),
                        ("sentencepiece:", "no vocabulary size"), ("sentencepiece:4k", "no vocabulary size"),
                        ("sentencepiece:100", "262")):
        with pytest.raises(InputError, match=words) as caught:
            parse_spec(spec, 4096)
        assert caught.value.field == "data.tokenizer"
