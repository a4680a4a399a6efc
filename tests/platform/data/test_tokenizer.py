"""Tokenizers: trained the same every time, and exact about the bytes behind each token."""

import json

import pytest

from kvlab.platform.data import fingerprint, tokenizer, vocabulary
from kvlab.platform.data.documents import DataError

TEXTS = ["def f(x):\n    return x + 1\n", "Grüße, 世界 🙂!", "", "<|endoftext|> is text", "  "]


def bytes_per_token(coder):
    coded = coder.encode(TEXTS)
    for text, (ids, widths) in zip(TEXTS, coded, strict=True):
        assert int(widths.sum()) == len(text.encode())
        assert len(ids) == len(widths)
        assert (widths >= 0).all()
    return coded


def test_bpe_is_the_same_every_time_and_exact_about_bytes():
    one, two = (tokenizer.make({"bpe": 300}, iter(TEXTS * 20)) for _ in range(2))
    assert one.tokenizer.to_str() == two.tokenizer.to_str()
    assert one.end == 0
    assert one.tokenizer.id_to_token(0) == "<|endoftext|>"
    for text, (ids, _) in zip(TEXTS, bytes_per_token(one), strict=True):
        assert 0 not in ids
        assert one.tokenizer.decode(list(ids)) == text


def test_the_bytes_tokenizer_has_one_token_a_byte():
    coder = tokenizer.make({"bytes": True}, ())
    assert coder.size == vocabulary.size({"bytes": True}) == 257
    for text, (ids, widths) in zip(TEXTS, bytes_per_token(coder), strict=True):
        assert len(ids) == len(text.encode())
        assert (widths == 1).all()


def test_a_given_tokenizer_is_read_from_file_or_folder(tmp_path):
    made = tokenizer.make({"bpe": 300}, iter(TEXTS * 20))
    made.tokenizer.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        coder = tokenizer.make({"path": str(path)}, ())
        assert coder.end == 0
        assert coder.size == made.size == vocabulary.size({"path": str(path)})
        bytes_per_token(coder)
    before = fingerprint.tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "a"}}))
    assert fingerprint.tokenizer(tmp_path) != before
    assert vocabulary.end_of_text(tmp_path) == made.tokenizer.token_to_id("a")


def test_bytes_are_exact_without_a_byte_level_vocabulary(tmp_path):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    unigram = Tokenizer(models.Unigram())
    unigram.normalizer = normalizers.NFKC()
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    unigram.train_from_iterator(TEXTS * 20, trainer)
    unigram.save(str(tmp_path / "tokenizer.json"))
    coder = tokenizer.make({"path": str(tmp_path)}, ())
    assert coder.end == vocabulary.end_of_text(tmp_path) == 1
    assert coder.size == vocabulary.size({"path": str(tmp_path)})
    for text, (ids, widths) in zip(TEXTS, coder.encode(TEXTS), strict=True):
        assert int(widths.sum()) == (len(text.encode()) if len(ids) else 0)


@pytest.mark.parametrize(
    ("template", "begin"),
    [("<s> $A", 1), ("<s> $A </s>", 1), ("$A </s>", None), ("$A", None)],
)
def test_a_beginning_of_text_is_the_tokenizers_own(tmp_path, template, begin):
    from tokenizers import processors

    made = tokenizer.make({"bpe": 300}, iter(TEXTS * 20)).tokenizer
    special = [(name, made.token_to_id(letter)) for name, letter in (("<s>", "!"), ("</s>", '"'))]
    made.post_processor = processors.TemplateProcessing(template, special_tokens=special)
    made.save(str(tmp_path / "tokenizer.json"))
    coder = tokenizer.make({"path": str(tmp_path)}, ())
    assert coder.begin == begin
    ids, widths = coder.opening
    assert ids.tolist() == [begin] * (begin is not None)
    assert widths.sum() == 0
    for ids, _ in bytes_per_token(coder):
        assert begin is None or begin not in ids[:1]


def test_bad_tokenizers_are_one_line(tmp_path):
    with pytest.raises(DataError, match=r"no tokenizer\.json there"):
        tokenizer.make({"path": str(tmp_path)}, ())
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        tokenizer.make({"path": str(file)}, ())
    file.write_text(json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}))
    with pytest.raises(DataError, match=r"no end-of-text token .*eos_token"):
        tokenizer.make({"path": str(file)}, ())
    with pytest.raises(DataError, match="bpe must be at least 257, found 100"):
        tokenizer.make({"bpe": 100}, ())


def test_a_tokenizer_nested_without_end_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        vocabulary.tokens_of(tmp_path)
