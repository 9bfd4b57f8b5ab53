"""The battery that every tokenizer passes: lossless byte for byte, whatever the text."""

import functools
import json
import pathlib
import sys
import sysconfig
import tempfile

import numpy as np
import pytest

from research.data import subwords, vocabulary
from research.data.tokenizer import TOKENIZERS, directory_of, load_tokenizer, parse_spec
from research.errors import InputError
from tests.data.corpora import NASTY


@functools.cache
def stdlib_texts() -> dict[str, str]:
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    names = ("json/decoder.py", "textwrap.py", "argparse.py", "encodings/cp437.py", "html/entities.py",
             "this.py")
    return {name: (root / name).read_bytes().decode("utf-8") for name in names}


def write_byte_level_bpe(directory: str | pathlib.Path) -> pathlib.Path:
    """A GPT-2-like tokenizer.json whose specials come first, in our order."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=list(vocabulary.SPECIALS), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    found.train_from_iterator(stdlib_texts().values(), trainer)
    found.save(str(pathlib.Path(directory, "tokenizer.json")))
    return pathlib.Path(directory)


@functools.cache
def tokenizer(name: str):
    if name in ("wordpiece", "huggingface"):
        pytest.importorskip("tokenizers")
    if name == "bytes":
        return TOKENIZERS[name]()
    if name == "huggingface":
        with tempfile.TemporaryDirectory() as directory:
            return load_tokenizer(write_byte_level_bpe(directory))
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


TRAINED = [name for name in TOKENIZERS if name not in ("bytes", "huggingface")]


@pytest.mark.parametrize("name", TRAINED)
def test_training_is_deterministic_and_compresses(name):
    first = tokenizer(name)
    again = TOKENIZERS[name].train(iter(stdlib_texts().values()), 1000)
    assert again.fingerprint() == first.fingerprint() and first.vocab_size == 1000 and first.chat_ids == {}
    text = stdlib_texts()["argparse.py"]
    assert len(first.encode(text)) < 0.6 * len(text)


@pytest.mark.parametrize("name", TRAINED)
def test_chat_markers_follow_the_specials_and_text_never_gives_them(name, tmp_path):
    if name == "wordpiece":
        pytest.importorskip("tokenizers")
    found = TOKENIZERS[name].train(list(stdlib_texts().values()), 900, chat=True)
    assert found.chat_ids == {"<|user|>": 5, "<|assistant|>": 6, "<|end|>": 7}
    text = "<|user|>hi<|end|> <s>"
    ids = found.encode(text)
    assert ids.min() > 7 and found.decode(ids) == text
    assert found.decode([5, *ids, 7]) == text and not found.token_bytes_V[:8].any()
    found.save(tmp_path)
    assert load_tokenizer(tmp_path).chat_ids == found.chat_ids


def test_a_hugging_face_directory_says_its_roles(tmp_path):
    write = pytest.importorskip("tokenizers") and write_byte_level_bpe
    data = json.loads((write(tmp_path) / "tokenizer.json").read_text())
    for i, name in enumerate(("<a>", "<b>", "<c>", "<d>", "<e>")):  # names that say nothing
        old = data["added_tokens"][i]["content"]
        data["added_tokens"][i]["content"] = name
        data["model"]["vocab"][name] = data["model"]["vocab"].pop(old)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="eos_token") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.field == "data.tokenizer"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<d>"}, "bos_token": None}))
    found = load_tokenizer(tmp_path)
    assert (found.bos_id, found.eos_id, found.pad_id, found.mask_id) == (3, 3, 3, -1) and found.lossless
    found.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").eos_id == 3
    (tmp_path / "tokenizer.json").write_text(json.dumps({**data, "model": {"type": "Unheard"}}))
    with pytest.raises(InputError, match="can't be read"):
        load_tokenizer(tmp_path)


def test_a_lossy_vocabulary_is_taken_with_a_warning(tmp_path, caplog):
    library = pytest.importorskip("tokenizers")
    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "def": 5, "re": 6, "##turn": 7}
    found = library.Tokenizer(library.models.WordPiece(words, unk_token="[UNK]"))
    found.normalizer = library.normalizers.BertNormalizer()
    found.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    found.decoder = library.decoders.WordPiece()
    found.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    found.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert not loaded.lossless and (loaded.bos_id, loaded.eos_id, loaded.mask_id) == (2, 3, 4)
    assert loaded.encode("DEF  return").tolist() == [5, 6, 7] and loaded.decode([2, 5, 6, 7, 3]) == "def return"
    assert loaded.token_bytes_V.tolist() == [0] * 5 + [3, 2, 4]


def test_without_the_library_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InputError, match=r"rung\[hf\]"):
        TOKENIZERS["wordpiece"].train(["text"], 600)


def test_directory_of(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert directory_of("mine") == pathlib.Path("mine") and directory_of(str(tmp_path)) == tmp_path
    assert directory_of("bytes") is directory_of("sentencepiece:400") is directory_of("sentencepeice") is None
    for missing in ("no/such", "./mime", "~/no-such-tokenizer"):
        with pytest.raises(InputError, match="no directory"):
            directory_of(missing)


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


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("nothing", [[], [""], ["\t\0\t"]])
def test_training_on_nothing_says_so(name, nothing):
    if name == "wordpiece" and pytest.importorskip("tokenizers") and any(nothing):
        nothing = [""]  # it does take tabs
    with pytest.raises(InputError, match="no text"):
        TOKENIZERS[name].train(nothing, 600)


@pytest.mark.parametrize("name", TRAINED)
def test_every_kind_says_how_large_a_vocabulary_it_can_fill(name):
    if name == "wordpiece":
        pytest.importorskip("tokenizers")
    texts = ["the quick brown fox jumps over the lazy dog\n" * 3]
    with pytest.raises(InputError, match="larger than the corpus fills") as caught:
        TOKENIZERS[name].train(texts, 5000)
    assert caught.value.field == "data.tokenizer"
    largest = int(caught.value.cure.split(f"{name}:")[1].rstrip(")"))
    assert TOKENIZERS[name].train(texts, largest).vocab_size == largest < 5000


def test_parse_spec():
    assert parse_spec("bytes", 300) == ("bytes", 261)
    assert parse_spec("sentencepiece", 4096) == ("sentencepiece", 4096)
    assert parse_spec("sentencepiece:512", 4096) == ("sentencepiece", 512)
    for spec, words in (("byte", "did you mean bytes"), ("bytes:300", "fixed"),
                        ("sentencepiece:", "no vocabulary size"), ("sentencepiece:4k", "no vocabulary size"),
                        ("sentencepiece:100", "262"),
                        ("wordpiece:300", "wordpiece:517"), ("huggingface", "directory")):
        with pytest.raises(InputError, match=words) as caught:
            parse_spec(spec, 4096)
        assert caught.value.field == "data.tokenizer"
