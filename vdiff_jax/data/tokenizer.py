"""Prompts to token ids: `encode(prompts, context_length) -> tokens i32 [b n], mask bool [b n]`.

A sequence is BOS, the prompt's tokens, EOS, then padding; the mask is True up to and including EOS. The empty
prompt "" is the null prompt: BOS EOS. Any `tokenizer.json` works through the same class: BOS and EOS are what it puts
around a text (T5's has no BOS), the padding token is the one it names; where it says neither, they are found by their
usual names (`[CLS]` and `[SEP]` are BOS and EOS in BERT's vocabulary).
"""

from __future__ import annotations

import os
import uuid
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

PAD, UNK, BOS, EOS = "[PAD]", "[UNK]", "[BOS]", "[EOS]"
_NAMES = {  # the names public tokenizers give to the four roles, tried in this order
    "pad": (PAD, "<pad>", "<|pad|>", "<|endoftext|>", "</s>"),
    "unk": (UNK, "<unk>", "<|endoftext|>"),
    "bos": (BOS, "[CLS]", "<s>", "<|startoftext|>"),
    "eos": (EOS, "[SEP]", "</s>", "<|endoftext|>"),
}
FILE_NAME = "tokenizer.json"


class Tokenizer:
    """A `tokenizers.Tokenizer` with BOS, EOS and padding to a fixed length. Picklable; equal files, equal ids.

    max_length: tokens of a prompt that the tokenizer's own file allows, or None where it says nothing.
    """

    def __init__(self, text: str):
        """text: the content of a tokenizer.json. Raises ValueError if it is none or lacks an EOS or padding token."""
        from tokenizers import Tokenizer as Fast

        try:
            self._fast: Any = Fast.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"this is not a tokenizer.json ({error}); save one with Tokenizer.save") from error
        self._text = text
        padding, truncation = self._fast.padding, self._fast.truncation
        self._fast.no_padding()
        self._fast.no_truncation()
        ids = {role: self._find(names) for role, names in _NAMES.items()} | self._ends()
        if padding and self._fast.token_to_id(padding["pad_token"]) == padding["pad_id"]:
            ids["pad"] = padding["pad_id"]
        for role in ("pad", "eos"):
            if ids[role] is None:
                raise ValueError(f"the tokenizer has no {role} token; add one of {', '.join(_NAMES[role])}")
        self.pad_id, self.unk_id, self.bos_id, self.eos_id = ids["pad"], ids["unk"], ids["bos"], ids["eos"]
        self.max_length: int | None = truncation["max_length"] if truncation else None

    def _ends(self) -> dict[str, int | None]:
        """What the tokenizer itself puts before and after a text: nothing, EOS, or BOS and EOS."""
        around = self._fast.encode("", add_special_tokens=True)
        ids = [index for index, special in zip(around.ids, around.special_tokens_mask) if special]
        return {"bos": ids[0] if len(ids) == 2 else None, "eos": ids[-1]} if 0 < len(ids) < 3 else {}

    def _find(self, names: Sequence[str]) -> int | None:
        return next((i for i in map(self._fast.token_to_id, names) if i is not None), None)

    def __reduce__(self):
        return Tokenizer, (self._text,)

    @property
    def text(self) -> str:
        """The content of its tokenizer.json."""
        return self._text

    @property
    def vocab_size(self) -> int:
        """Number of ids, the size of an embedding table: 1 + the largest id."""
        return 1 + max(self._fast.get_vocab(with_added_tokens=True).values())

    def encode(self, prompts: Sequence[str], context_length: int) -> tuple[np.ndarray, np.ndarray]:
        """`b` prompts -> tokens i32 [b context_length], mask bool [b context_length] (True at BOS, words, EOS).

        Warns, naming them, about words the vocabulary lacks and about the words cut from a prompt that is too long.
        Raises ValueError for a single string, for something that is not text, and for a context too short for BOS, EOS.
        """
        if isinstance(prompts, str):
            raise ValueError("encode takes a list of prompts; put the prompt in a list")
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise ValueError(f"a prompt must be a string, got {type(prompt).__name__}: {prompt!r}")
        head = [] if self.bos_id is None else [self.bos_id]
        room = context_length - len(head) - 1
        if room < 0:
            raise ValueError(f"context_length {context_length} has no room for the start and end tokens; use more")
        encodings = self._fast.encode_batch(list(prompts), add_special_tokens=False)
        tokens = np.full((len(prompts), context_length), self.pad_id, np.int32)
        mask = np.zeros((len(prompts), context_length), bool)
        for row, (prompt, encoding) in enumerate(zip(prompts, encodings)):
            self._warn(prompt, encoding, room)
            ids = [*head, *encoding.ids[:room], self.eos_id]
            tokens[row, : len(ids)] = ids
            mask[row, : len(ids)] = True
        return tokens, mask

    def with_words(self, words: Sequence[str]) -> tuple[Tokenizer, list[int]]:
        """A tokenizer that knows these words too, and their ids; all other ids stay.

        A word stands for itself, never inside a longer one, and is written as the vocabulary is (lower case, say).
        Raises ValueError for a word that is known already, is not one word, or is given twice.
        """
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Fast

        fast: Any = Fast.from_str(self._text)
        words = [fast.normalizer.normalize_str(word) if fast.normalizer else word for word in words]
        vocabulary = fast.get_vocab(with_added_tokens=True)
        for word in words:
            if not word or word.split() != [word] or words.count(word) > 1:
                raise ValueError(f"new word {word!r}: give single words, each once")
            if word in vocabulary:
                raise ValueError(f"new word {word!r}: the tokenizer knows it already, so it needs no new embedding")
            fast.add_tokens([AddedToken(word, single_word=True, normalized=True)])
        larger = Tokenizer(fast.to_str())
        return larger, [larger.word_id(word) for word in words]

    def word_id(self, word: str) -> int:
        """The id of a word. Raises ValueError if it has none of its own."""
        index = self._fast.token_to_id(word)
        if index is None:
            raise ValueError(f"the tokenizer does not know the word {word!r}")
        return index

    def decode(self, tokens: np.ndarray) -> list[str]:
        """i32 [b n] -> prompts, special tokens left out."""
        special = {self.pad_id, self.bos_id, self.eos_id}
        rows = [[int(i) for i in row if int(i) not in special] for row in np.asarray(tokens)]
        prompts = self._fast.decode_batch(rows, skip_special_tokens=False)
        suffix = getattr(self._fast.model, "end_of_word_suffix", None)  # CLIP's, which its decoder leaves in the text
        return [prompt.replace(suffix, " ").strip() for prompt in prompts] if suffix else prompts

    def save(self, path: str | os.PathLike) -> Path:
        """Write tokenizer.json (`path` itself, or inside it when it is a folder)."""
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            temporary.write_text(self._text, encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> Tokenizer:
        """Read a tokenizer.json (a file, or a folder that holds one). Raises FileNotFoundError or ValueError."""
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; give a tokenizer.json or a folder that holds one")
        try:
            return cls(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"cannot load {path}: {error}") from error

    def _warn(self, prompt: str, encoding: Any, room: int) -> None:
        if self.unk_id is not None and self.unk_id in encoding.ids:
            spans = (span for i, span in zip(encoding.ids, encoding.offsets) if i == self.unk_id)
            words = dict.fromkeys(prompt[a:b] for a, b in spans)
            warnings.warn(
                f"the prompt {prompt!r} has words the tokenizer does not know: {', '.join(words)}", stacklevel=3
            )
        if len(encoding.ids) > room:
            cut = prompt[encoding.offsets[room][0] :]
            extra = len(encoding.ids) - room
            warnings.warn(f"the prompt {prompt!r} is {extra} tokens too long; cut from it: {cut!r}", stacklevel=3)


def train_tokenizer(captions: Iterable[str], vocab_size: int = 1024, kind: str = "word") -> Tokenizer:
    """A tokenizer made from captions, lower-cased.

    kind: "word" has one id a word or punctuation mark, for closed vocabularies; "bpe" has byte-level pieces
        (Sennrich et al. 2016), for open ones: it knows every string.
    vocab_size: upper bound on the ids, the four special tokens included.
    Raises ValueError for no captions, a wrong kind or a vocabulary that has no room for the special tokens.
    """
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    captions = [caption for caption in captions if caption.strip()]
    if not captions:
        raise ValueError("cannot train a tokenizer without captions; give at least one that is not empty")
    smallest = {"word": 5, "bpe": 260}.get(kind)
    if smallest is None:
        raise ValueError(f'kind must be "word" or "bpe", got {kind!r}')
    if vocab_size < smallest:
        raise ValueError(f"vocab_size {vocab_size} is too small for kind {kind!r}; use {smallest} or more")
    special = [PAD, UNK, BOS, EOS]
    if kind == "word":
        fast: Any = Fast(models.WordLevel(unk_token=UNK))
        fast.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer: Any = trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    else:
        fast = Fast(models.BPE())
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    fast.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    fast.train_from_iterator(captions, trainer)
    return Tokenizer(fast.to_str())
