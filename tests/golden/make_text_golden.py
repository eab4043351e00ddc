"""Makes tiny_bert/: a random BERT saved by transformers, its tokenizer, and its outputs on masked prompts.

Needs torch and transformers (the extra `oracle`):  python tests/golden/make_text_golden.py
"""

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import BertConfig, BertModel

FOLDER = Path(__file__).parent / "tiny_bert"
WORDS = "a red green blue circle square triangle moving left right up down on black grey".split()
PROMPTS = ["a red circle moving right", "a square", "", "a green triangle moving up on black grey"]


def make_tokenizer() -> Tokenizer:
    vocab = {token: index for index, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, "##s"])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def main() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=12, type_vocab_size=2, hidden_act="gelu",
    )  # fmt: skip
    model = BertModel(config).eval()
    with torch.no_grad():  # far from the usual start, so that every parameter matters
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4 + 0.1)
    model.save_pretrained(FOLDER, safe_serialization=True)
    tokenizer = make_tokenizer()
    tokenizer.save(str(FOLDER / "tokenizer.json"))

    tokens = np.zeros((len(PROMPTS), 10), np.int64)
    mask = np.zeros((len(PROMPTS), 10), bool)
    for row, prompt in enumerate(PROMPTS):
        ids = [2, *tokenizer.encode(prompt, add_special_tokens=False).ids, 3]
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
    with torch.no_grad():
        output = model(torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask)).last_hidden_state
    np.savez_compressed(FOLDER / "expected.npz", tokens=tokens.astype(np.int32), mask=mask, output=output.numpy())
    (FOLDER / "prompts.json").write_text(json.dumps(PROMPTS) + "\n")


if __name__ == "__main__":
    main()
