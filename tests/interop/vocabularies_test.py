"""Tokenizers that aren't a tokenizer.json: those that models bring, and ours on the way out. The same ids, or none."""

import functools
import io
import json
import pathlib
import sysconfig

import pytest
import sentencepiece

from research.data.tokenizer import TOKENIZERS, load_tokenizer
from research.errors import InputError
from research.interop.vocabularies import export_tokenizer, import_tokenizer
from tests.data.corpora import NASTY

pytest.importorskip("tokenizers")
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None,
         "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False, "legacy": False,
         "added_tokens_decoder": {"0": {"content": "<unk>"}, "1": {"content": "<s>"}, "2": {"content": "</s>"}}}


@functools.cache
def modules() -> tuple[str, ...]:
    names = ("argparse", "textwrap", "json/decoder", "this", "codecs", "shlex")
    return tuple((pathlib.Path(sysconfig.get_path("stdlib")) / f"{name}.py").read_text("utf-8") for name in names)


def texts() -> list[str]:
    return [*modules(), *NASTY, " two  words  # 2024 \r\n", "=-" * 40]


@functools.cache
def llama_model(**options) -> bytes:
    """As Llama 1 and 2 and Mistral have it: BPE, bytes, a space before every text, no normalisation."""
    model = io.BytesIO()
    usual = dict(model_type="bpe", vocab_size=900, normalization_rule_name="identity", remove_extra_whitespaces=False,
                 byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True, unk_id=0, bos_id=1, eos_id=2,
                 pad_id=-1, minloglevel=2, num_threads=1)
    lines = [line for text in modules() for line in text.splitlines()]
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **usual | options)
    return model.getvalue()


def write(directory: pathlib.Path, model: bytes, config: dict) -> pathlib.Path:
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.model").write_bytes(model)
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("prefix", [True, False])
def test_llama_s_tokenizer_model(prefix, tmp_path):
    """Imported: SentencePiece's own ids. Exported: transformers gives them, too, and what it puts in front."""
    model = llama_model(add_dummy_prefix=prefix)
    directory = write(tmp_path / "model", model, LLAMA)
    found = import_tokenizer(directory, "llama")
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in texts():
        assert found.encode(text).tolist() == processor.encode(text), text[:60]
    assert (found.bos_id, found.eos_id, found.unk_id, found.begins, found.vocab_size) == (1, 2, 0, (1,), 900)
    found.save(tmp_path / "run" / "tokenizer")
    (tmp_path / "back").mkdir()
    export_tokenizer(tmp_path / "run", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "tokenizer_config.json").read_text()) == LLAMA | {
        "tokenizer_class": "PreTrainedTokenizerFast"}
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path / "back")
    for text in texts():
        if not any(token in text for token in ("<s>", "</s>", "<unk>")):  # which are no text there
            assert theirs.encode(text, add_special_tokens=False) == processor.encode(text), text[:60]
    assert theirs("def f(x)").input_ids == [1, *processor.encode("def f(x)")]
    assert theirs.decode(processor.encode("def  f(x):\n")) == processor.decode(processor.encode("def  f(x):\n"))


@pytest.mark.parametrize("options, words", [
    (dict(normalization_rule_name="nmt_nfkc"), "normalisation nmt_nfkc"),
    (dict(remove_extra_whitespaces=True), "normalisation"),
    (dict(model_type="unigram"), "another kind than BPE"), (dict(user_defined_symbols="<x>"), "pieces of the types [4]")])
def test_what_can_t_be_converted_exactly_isn_t(options, words, tmp_path, caplog):
    assert import_tokenizer(write(tmp_path / "model", llama_model(**options), LLAMA), "llama") is None
    assert words in caplog.text and caplog.text.count("\n") == 1


def test_tokens_beside_the_vocabulary_are_not_dropped(tmp_path, caplog):
    directory = write(tmp_path / "model", llama_model(), LLAMA | {"added_tokens_decoder": {"900": {"content": "<x>"}}})
    assert import_tokenizer(directory, "llama") is None and "tokens beside its vocabulary" in caplog.text
    write(directory, llama_model(), LLAMA)
    (directory / "added_tokens.json").write_text(json.dumps({"<x>": 900}))
    caplog.clear()
    assert import_tokenizer(directory, "llama") is None and "tokens beside its vocabulary" in caplog.text


@pytest.mark.parametrize("model", [b"", b"x" * 1000, llama_model()[:-7], b"\x0a" * 99], ids=range(4))
def test_a_file_that_is_no_model(model, tmp_path):
    with pytest.raises(InputError, match="tokenizer.model is no SentencePiece model"):
        import_tokenizer(write(tmp_path / "model", model, LLAMA), "llama")


def write_gpt2(directory: pathlib.Path) -> pathlib.Path:
    library = pytest.importorskip("tokenizers")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = library.trainers.BpeTrainer(vocab_size=600, special_tokens=["<|endoftext|>"], show_progress=False,
                                          initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(modules(), trainer)
    directory.mkdir()
    tokenizer.model.save(str(directory))
    return directory


@pytest.mark.parametrize("config", [
    None, {"model_max_length": 1024}, {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}])
def test_gpt2_s_two_files(config, tmp_path):
    """As transformers reads them, before and after."""
    transformers = pytest.importorskip("transformers")
    directory = write_gpt2(tmp_path / "model")
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    found = import_tokenizer(directory, "gpt2")
    found.save(tmp_path / "run" / "tokenizer")
    (tmp_path / "back").mkdir()
    export_tokenizer(tmp_path / "run", tmp_path / "back")
    before, after = transformers.GPT2Tokenizer.from_pretrained(directory), transformers.AutoTokenizer.from_pretrained(
        tmp_path / "back")
    for text in texts():
        ids = found.encode(text).tolist()
        assert ids == before.encode(text, add_special_tokens=False) == after.encode(text, add_special_tokens=False), text[:60]
    assert found.eos_id == before.eos_token_id == after.eos_token_id == found.special_ids()["eos_token_id"]


def test_other_tokenizers_of_such_files_are_left(tmp_path, caplog):
    """Qwen's cuts words otherwise; a file of GPT-2's whose end token isn't in it would get one more id."""
    directory = write_gpt2(tmp_path / "model")
    assert import_tokenizer(directory, "qwen3") is None and "an unnamed class" in caplog.text
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    assert import_tokenizer(directory, "gpt2") is None and "Qwen2Tokenizer" in caplog.text
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>"}))
    assert import_tokenizer(directory, "gpt2") is None and "tokens beside its vocabulary" in caplog.text
    (directory / "vocab.json").write_text("[]")
    with pytest.raises(InputError, match="vocab.json can't be read"):
        import_tokenizer(directory, "gpt2")


@pytest.mark.parametrize("chat", [False, True])
def test_ours_as_transformers_reads_it(chat, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = TOKENIZERS["sentencepiece"].train(modules(), 900, chat)
    ours.save(tmp_path / "run" / "tokenizer")
    (tmp_path / "back").mkdir()
    assert export_tokenizer(tmp_path / "run", tmp_path / "back").fingerprint() == ours.fingerprint()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    for text in [*texts(), "<s> and <|user|> in a text</s>"]:
        ids = ours.encode(text).tolist()
        assert theirs.encode(text, add_special_tokens=False) == ids, text[:60]
        assert theirs.decode(ids) == text
    assert theirs("hi").input_ids == [*ours.begins, *ours.encode("hi").tolist()]
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (0, 1, 2, 3)
    assert len(theirs) == ours.vocab_size
    again = load_tokenizer(tmp_path / "back")
    assert again.lossless and again.encode(NASTY[5]).tolist() == ours.encode(NASTY[5]).tolist()


def test_ours_that_would_have_other_ids(tmp_path, caplog):
    """Unigram: its own files instead, and a line that says so."""
    ours = TOKENIZERS["unigram"].train(modules(), 900)
    ours.save(tmp_path / "run" / "tokenizer")
    (tmp_path / "back").mkdir()
    assert export_tokenizer(tmp_path / "run", tmp_path / "back").fingerprint() == ours.fingerprint()
    assert [path.name for path in (tmp_path / "back").iterdir()] == ["tokenizer"]
    assert load_tokenizer(tmp_path / "back" / "tokenizer").fingerprint() == ours.fingerprint()
    assert "unigram" in caplog.text and caplog.text.count("\n") == 1
