"""Tokenizers of transformers' folders: the same ids, ends and padding (tests/golden/make_encoder_golden.py)."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from vdiff_jax.data.tokenizer import Tokenizer, train_tokenizer
from vdiff_jax.interop.tokenizer import load_tokenizer, save_tokenizer

GOLDEN = Path(__file__).parent.parent / "golden"
CLIP, BANG, T5 = "tiny_clip_tokenizer", "tiny_clip_tokenizer_bang", "tiny_t5"

pytestmark = pytest.mark.filterwarnings("ignore:the prompt")  # some are too long, or name special tokens, on purpose


def golden(name):
    rows = json.loads((GOLDEN / name / "prompts.json").read_text())
    return rows["prompts"], np.array(rows["tokens"], np.int32), np.array(rows["mask"], bool)


def assert_golden(tokenizer, name):
    prompts, tokens, mask = golden(name)
    ours, our_mask = tokenizer.encode(prompts, tokens.shape[1])
    np.testing.assert_array_equal(ours, tokens)
    np.testing.assert_array_equal(our_mask, mask)


@pytest.mark.parametrize("name", [CLIP, BANG, T5])
def test_ids_equal_those_of_transformers_and_go_through_every_file(tmp_path, name):
    tokenizer = load_tokenizer(GOLDEN / name)
    assert_golden(tokenizer, name)
    assert_golden(pickle.loads(pickle.dumps(tokenizer)), name)
    tokenizer.save(tmp_path)  # as it lies in our own model folders
    assert_golden(Tokenizer.load(tmp_path), name)
    save_tokenizer(tmp_path / "theirs", tokenizer)
    again = load_tokenizer(tmp_path / "theirs")
    assert_golden(again, name)
    assert again.max_length == tokenizer.max_length == (None if name == T5 else 24)
    assert (tmp_path / "theirs" / "merges.txt").exists() == (name != T5)
    (tmp_path / "theirs" / "tokenizer.json").unlink()
    if name != T5:
        assert_golden(load_tokenizer(tmp_path / "theirs"), name)  # from vocab.json and merges.txt alone
        for file in ("vocab.json", "merges.txt"):
            theirs = (GOLDEN / name / file).read_text(encoding="utf-8")
            ours = (tmp_path / "theirs" / file).read_text(encoding="utf-8")
            assert json.loads(ours) == json.loads(theirs) if file == "vocab.json" else ours == theirs


def test_ends_and_padding():
    clip, bang, t5 = (load_tokenizer(GOLDEN / name) for name in (CLIP, BANG, T5))
    assert (clip.bos_id, clip.eos_id, clip.pad_id) == (527, 528, 528)
    assert (bang.bos_id, bang.eos_id, bang.pad_id) == (527, 528, 0)
    assert (t5.bos_id, t5.eos_id, t5.pad_id) == (None, 1, 0)
    assert bang.encode([""], 4)[0].tolist() == [[527, 528, 0, 0]]
    assert t5.encode([""], 4)[0].tolist() == [[1, 0, 0, 0]]
    tokens, mask = clip.encode(["red " * 40], 6)
    assert mask.all() and tokens[0, 0] == 527 and tokens[0, -1] == 528
    assert clip.decode(clip.encode(["A  red\ncircle, moving"], 24)[0]) == ["a red circle , moving"]


def test_new_words_keep_the_padding():
    larger, (index,) = load_tokenizer(GOLDEN / BANG).with_words(["Sks"])
    assert index == 529 and larger.pad_id == 0 and larger.vocab_size == 530
    tokens, _ = larger.encode(["a sks circle"], 8)
    assert index in tokens[0]


def test_our_own_tokenizers_go_through_such_a_folder(tmp_path):
    for kind, size in (("word", 32), ("bpe", 300)):
        ours = train_tokenizer(["a red circle moving"], vocab_size=size, kind=kind)
        save_tokenizer(tmp_path / kind, ours)
        again = load_tokenizer(tmp_path / kind)
        for prompt in ("a red circle", ""):
            np.testing.assert_array_equal(again.encode([prompt], 30)[0], ours.encode([prompt], 30)[0])


def copy(tmp_path):
    return Path(shutil.copytree(GOLDEN / CLIP, tmp_path / "tokenizer"))


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_added_tokens_have_the_ids_that_the_files_give(tmp_path):
    folder = copy(tmp_path)
    (folder / "added_tokens.json").write_text(json.dumps({"<cat>": 529, "<dog>": 530}))
    assert load_tokenizer(folder).encode(["<dog> red <cat>"], 6)[0][0, 1] == 530
    (folder / "added_tokens.json").write_text(json.dumps({"<cat>": 600}))
    with pytest.raises(ValueError, match=r"the added token '<cat>' should have id 600"):
        load_tokenizer(folder)


def test_the_newer_configuration_overrides_the_older_map(tmp_path):
    folder = copy(tmp_path)
    edit(folder / "special_tokens_map.json", pad_token="!")
    assert load_tokenizer(folder).pad_id == 0
    entry = dict(content="<|endoftext|>", lstrip=False, normalized=True, rstrip=False, single_word=False, special=True)
    edit(folder / "tokenizer_config.json", added_tokens_decoder={"528": entry}, eos_token="<|endoftext|>")
    edit(folder / "tokenizer_config.json", bos_token="<|startoftext|>", unk_token="<|endoftext|>")
    assert load_tokenizer(folder).pad_id == 528


def test_broken_folders_are_named(tmp_path):
    folder = copy(tmp_path)
    edit(folder / "special_tokens_map.json", pad_token="[PAD]")
    with pytest.raises(ValueError, match=r"vocab\.json lacks the pad_token '\[PAD\]'"):
        load_tokenizer(folder)
    edit(folder / "special_tokens_map.json", pad_token="!")
    (folder / "merges.txt").write_text("#version: 0.2\nq zz\n")
    with pytest.raises(ValueError, match=r"merges\.txt does not fit vocab\.json"):
        load_tokenizer(folder)
    (folder / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json, nor vocab\.json and merges\.txt"):
        load_tokenizer(folder)
