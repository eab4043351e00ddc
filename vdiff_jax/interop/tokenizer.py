"""Tokenizers in the folders of transformers, read and written.

A folder has a tokenizer.json, or the vocab.json and merges.txt of CLIP, which say the same in an older way. Which
tokens start, end and pad a prompt stands beside them, in special_tokens_map.json and tokenizer_config.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vdiff_jax.data.tokenizer import FILE_NAME, Tokenizer
from vdiff_jax.interop.pretrained import load_json, save_json

Json = dict[str, Any]

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
_CLIP_ROLES = dict(
    bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>", pad_token="<|endoftext|>"
)
_UNLIMITED = 10**6  # transformers writes 10^30 where a tokenizer has no limit
_WORD_END = "</w>"
# Words of letters, English endings, single digits, runs of anything else that is not white (Radford et al. 2021).
_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a folder; its ids, ends, padding and `max_length` are those that transformers takes.

    Raises FileNotFoundError if there is none; ValueError for files that are broken or do not fit together.
    """
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Fast

    folder = Path(folder)
    settings = _optional_json(folder / "tokenizer_config.json")
    special = _special_tokens(folder, settings)
    if (folder / FILE_NAME).is_file():
        fast: Any = Fast.from_str(Tokenizer.load(folder).text)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        special = {**_CLIP_ROLES, **special}
        fast = _clip_tokenizer(folder, special)
    else:
        raise FileNotFoundError(f"{folder} has no {FILE_NAME}, nor vocab.json and merges.txt: it holds no tokenizer")
    known = {token.content for token in fast.get_added_tokens_decoder().values()}
    for role, token in special.items():
        if fast.token_to_id(_content(token)) is None:
            raise ValueError(f"{folder}: the vocabulary lacks the {role} {_content(token)!r}")
        if _content(token) not in known:
            fast.add_special_tokens([AddedToken(**_fields(token), special=True)])
    _add_tokens(fast, folder, settings)
    if "pad_token" in special:
        pad = _content(special["pad_token"])
        fast.enable_padding(pad_id=fast.token_to_id(pad), pad_token=pad)
    if settings.get("model_max_length", _UNLIMITED) < _UNLIMITED:
        fast.enable_truncation(int(settings["model_max_length"]))
    return Tokenizer(fast.to_str())


def save_tokenizer(folder: str | Path, tokenizer: Tokenizer) -> None:
    """Write the files of a folder that transformers loads: tokenizer.json, tokenizer_config.json and
    special_tokens_map.json, and CLIP's vocab.json and merges.txt where the vocabulary is of its kind."""
    from tokenizers import Tokenizer as Fast

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    fast: Any = Fast.from_str(tokenizer.text)
    fast.no_padding()  # transformers takes both from the other files, and pads and cuts only when it is asked to
    fast.no_truncation()
    Tokenizer(fast.to_str()).save(folder / FILE_NAME)
    model = json.loads(tokenizer.text)["model"]
    is_clip = model["type"] == "BPE" and model.get("end_of_word_suffix") == _WORD_END
    if is_clip:
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
        (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False) + "\n", encoding="utf-8")
    added = fast.get_added_tokens_decoder()
    special: Json = {}
    for role, index in zip(ROLES, (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.pad_id)):
        if index in added:
            flags = ("content", "lstrip", "normalized", "rstrip", "single_word")
            special[role] = {flag: getattr(added[index], flag) for flag in flags}
        elif index is not None:
            special[role] = fast.id_to_token(index)
    save_json(folder / "special_tokens_map.json", special)
    settings: Json = {role: _content(token) for role, token in special.items()}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if is_clip:
        settings["tokenizer_class"] = "CLIPTokenizer"
    elif model["type"] == "Unigram":
        extra = sum(str(token).startswith("<extra_id_") for token in fast.get_vocab())
        settings |= {"tokenizer_class": "T5Tokenizer", "extra_ids": extra}
    if tokenizer.max_length is not None:
        settings["model_max_length"] = tokenizer.max_length
    save_json(folder / "tokenizer_config.json", settings)


def _optional_json(path: Path) -> Json:
    return load_json(path) if path.is_file() else {}


def _special_tokens(folder: Path, settings: Json) -> Json:
    """A token, as a string or its fields, for each role that the files give one."""
    found = {role: settings[role] for role in ROLES if settings.get(role)}
    if "added_tokens_decoder" not in settings:  # the newer form, in which special_tokens_map.json is a leftover
        special = _optional_json(folder / "special_tokens_map.json")
        found |= {role: special[role] for role in ROLES if special.get(role)}
    return found


def _content(token: str | Json) -> str:
    return token if isinstance(token, str) else token["content"]


def _fields(token: str | Json) -> Json:
    """Arguments of an AddedToken."""
    if isinstance(token, str):
        return {"content": token}
    return {name: token[name] for name in ("content", "lstrip", "normalized", "rstrip", "single_word") if name in token}


def _clip_tokenizer(folder: Path, special: Json) -> Any:
    """CLIP's tokenizer from its vocabulary and merges: lower case, white space made single, byte-level pieces of words
    whose last piece is marked."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Fast

    vocab = load_json(folder / "vocab.json")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges: Any = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
    tokens = {role: _content(token) for role, token in special.items()}
    for role, token in tokens.items():
        if token not in vocab:
            raise ValueError(f"{folder / 'vocab.json'} lacks the {role} {token!r}")
    try:
        model = models.BPE(
            vocab=vocab, merges=merges, unk_token=tokens["unk_token"], end_of_word_suffix=_WORD_END, fuse_unk=False
        )
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{folder / 'merges.txt'} does not fit vocab.json ({error})") from error
    fast: Any = Fast(model)
    fast.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True)
    fast.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    fast.decoder = decoders.ByteLevel()
    bos, eos = tokens["bos_token"], tokens["eos_token"]
    fast.post_processor = processors.RobertaProcessing(
        (eos, vocab[eos]), (bos, vocab[bos]), trim_offsets=False, add_prefix_space=False
    )
    return fast


def _add_tokens(fast: Any, folder: Path, settings: Json) -> None:
    """Tokens that were added after the vocabulary was made, at the ids that the files give them."""
    from tokenizers import AddedToken

    added = {int(index): token for index, token in settings.get("added_tokens_decoder", {}).items()}
    added |= {index: token for token, index in _optional_json(folder / "added_tokens.json").items()}
    known = {token.content for token in fast.get_added_tokens_decoder().values()}
    for index, token in sorted(added.items()):
        if _content(token) not in known:
            is_special = isinstance(token, dict) and token.get("special", False)
            fast.add_tokens([AddedToken(**_fields(token), special=is_special)])
        if fast.token_to_id(_content(token)) != index:
            raise ValueError(f"{folder}: the added token {_content(token)!r} should have id {index}, which is taken")
