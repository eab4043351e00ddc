"""The tokenizer against hand-made truth: layouts, warnings, round trips, a WordPiece file of another make."""

import pickle
import warnings

import numpy as np
import pytest

from vdiff_jax.data.tokenizer import Tokenizer, train_tokenizer

CAPTIONS = ["a red circle moving right", "a blue square moving left", "two circles, one red"]


@pytest.fixture(scope="module")
def words():
    return train_tokenizer(CAPTIONS, vocab_size=64)


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_layout_is_bos_words_eos_padding(words):
    tokens, mask = words.encode(["a red circle", ""], 8)
    assert tokens.shape == mask.shape == (2, 8) and tokens.dtype == np.int32 and mask.dtype == bool
    assert mask.sum(1).tolist() == [5, 2]
    assert tokens[0, 0] == words.bos_id and tokens[0, 4] == words.eos_id and (tokens[0, 5:] == words.pad_id).all()
    assert tokens[1].tolist() == [words.bos_id, words.eos_id] + [words.pad_id] * 6
    again, _ = words.encode(["circle red A"], 8)
    assert again[0, 1:4].tolist() == tokens[0, 3:0:-1].tolist()  # one id a word, whatever its place or case
    assert len({words.pad_id, words.unk_id, words.bos_id, words.eos_id, *tokens[0, 1:4].tolist()}) == 7


@pytest.mark.parametrize(("kind", "size"), [("word", 64), ("bpe", 300)])
def test_round_trip_save_load_pickle(tmp_path, kind, size):
    tokenizer = train_tokenizer(CAPTIONS, vocab_size=size, kind=kind)
    assert tokenizer.vocab_size <= size
    tokens, mask = tokenizer.encode(CAPTIONS[:2], 40)
    assert tokenizer.decode(tokens) == CAPTIONS[:2]
    assert tokens.max() < tokenizer.vocab_size
    tokenizer.save(tmp_path)
    for other in (Tokenizer.load(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        again, mask_again = other.encode(CAPTIONS[:2], 40)
        np.testing.assert_array_equal(tokens, again)
        np.testing.assert_array_equal(mask, mask_again)
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]


def test_training_does_not_depend_on_the_order_of_captions(words):
    other = train_tokenizer(reversed(CAPTIONS), vocab_size=64)
    np.testing.assert_array_equal(words.encode(CAPTIONS, 12)[0], other.encode(CAPTIONS, 12)[0])


def test_bpe_knows_every_string():
    tokenizer = train_tokenizer(CAPTIONS, vocab_size=300, kind="bpe")
    prompt = "zebra \u00f8 \U0001f600"
    assert tokenizer.decode(tokenizer.encode([prompt], 40)[0]) == [prompt]


def test_a_long_prompt_is_cut_and_says_what(words):
    with pytest.warns(UserWarning, match=r"2 tokens too long; cut from it: 'moving right'"):
        tokens, mask = words.encode(["a red circle moving right"], 5)
    assert mask.all() and tokens[0, -1] == words.eos_id
    assert words.decode(tokens) == ["a red circle"]


def test_unknown_words_are_named(words):
    with pytest.warns(UserWarning, match=r"does not know: purple, zebra$"):
        tokens, _ = words.encode(["a purple zebra moving purple"], 8)
    assert (tokens[0] == words.unk_id).sum() == 3


def test_a_wordpiece_file_of_another_make(tmp_path):
    from tokenizers import Tokenizer as Fast
    from tokenizers import models, normalizers, pre_tokenizers, processors

    vocab = {t: i for i, t in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "walk", "##ing", "camel"])}
    fast = Fast(models.WordPiece(vocab, unk_token="[UNK]"))
    fast.normalizer = normalizers.BertNormalizer()
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast.enable_padding(length=32)
    fast.enable_truncation(4)
    fast.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    tokens, mask = tokenizer.encode(["a walking camel", ""], 7)
    assert tokens.tolist() == [[2, 4, 5, 6, 7, 3, 0], [2, 3, 0, 0, 0, 0, 0]]
    assert mask.sum(1).tolist() == [6, 2]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda t: t.encode("a red circle", 8), "in a list"),
        (lambda t: t.encode([None], 8), "must be a string, got NoneType"),
        (lambda t: t.encode(["a"], 1), "no room"),
        (lambda t: Tokenizer("{}"), "not a tokenizer.json"),
        (lambda t: train_tokenizer(["", " "]), "without captions"),
        (lambda t: train_tokenizer(CAPTIONS, kind="char"), "'char'"),
        (lambda t: train_tokenizer(CAPTIONS, vocab_size=3), "too small"),
    ],
)
def test_errors_are_one_sentence(words, call, match):
    with pytest.raises(ValueError, match=match) as caught:
        call(words)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Tokenizer.load(tmp_path)
