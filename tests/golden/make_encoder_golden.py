"""Makes tiny_clip_text/, tiny_clip_text_projection/, tiny_clip_vision/ and tiny_t5/: random encoders saved by
transformers, with inputs, outputs, the states after every block, and a gradient through one block.

Needs torch, diffusers and transformers (the extra `oracle`):  python tests/golden/make_encoder_golden.py
"""

import json
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing
from tokenizers.pre_tokenizers import ByteLevel

GOLDEN = Path(__file__).parent
TINY = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3)
TEXT = dict(vocab_size=60, max_position_embeddings=12, bos_token_id=58, eos_token_id=59)
PROMPTS = [
    "a red circle",
    "",
    "A  RED\tcircle\n moving, isn't it?!",
    "caf\u00e9 12 \U0001f600 tre\u0301s   ",
    "hello! <|endoftext|> red <|startoftext|>",
    "a red circle moving over and over and over and over and over and over and over and over",
]


def scatter(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Far from the usual start, so that every parameter matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(noise * 0.3 + (1.0 if "norm" in name and "weight" in name else 0.1))
            elif "embedding" in name or "shared" in name:
                parameter.copy_(noise * 0.7)
            else:
                parameter.copy_(noise * 1.5 / parameter[0].numel() ** 0.5)
    return model.eval()


def text_tokens(seed: int, rows: int = 3, length: int = 12, end: int = 59) -> np.ndarray:
    """BOS, ids, EOS, and EOS again as padding."""
    rng = np.random.default_rng(seed)
    tokens = np.full((rows, length), end, np.int64)
    for row in range(rows):
        count = int(rng.integers(1, length - 1))
        tokens[row, : count + 1] = [58, *rng.integers(0, 58, count)]
    return tokens


def states_and_gradient(model: torch.nn.Module, block: torch.nn.Module, inputs: dict):
    """Outputs, and the derivative of a fixed sum over the last block's output with respect to that block's input."""
    seen = {}

    def hook(_module, args, kwargs, output):
        entry = args[0] if args else kwargs["hidden_states"]
        entry.retain_grad()
        seen["input"], seen["output"] = entry, output[0] if isinstance(output, tuple) else output

    handle = block.register_forward_hook(hook, with_kwargs=True)
    result = model(**inputs, output_hidden_states=True)
    handle.remove()
    weight = torch.cos(torch.arange(seen["output"].numel(), dtype=torch.float32)).reshape(seen["output"].shape)
    (gradient,) = torch.autograd.grad((seen["output"] * weight).sum(), seen["input"])
    arrays = {f"state{index}": state for index, state in enumerate(result.hidden_states)}
    # where the library puts the final norm into the last of the hidden states, the block itself says what it wrote
    arrays[f"state{len(result.hidden_states) - 1}"] = seen["output"]
    return {name: value.detach().numpy() for name, value in {**arrays, "gradient": gradient}.items()}, result


def save(folder: Path, model: torch.nn.Module, arrays: dict[str, np.ndarray]) -> None:
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    np.savez_compressed(folder / "expected.npz", **arrays)


def make_text(folder: Path, projected: bool) -> None:
    settings = dict(hidden_act="gelu", projection_dim=16) if projected else dict(hidden_act="quick_gelu")
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    end = 59 if projected else 2  # both ways in which published configurations say where the prompt ends
    config = transformers.CLIPTextConfig(**{**TINY, **TEXT, **settings, "eos_token_id": end})
    model = scatter(kind(config), int(projected))
    tokens = text_tokens(int(projected))
    tower = model.text_model if projected else model
    arrays, result = states_and_gradient(model, tower.encoder.layers[-1], dict(input_ids=torch.from_numpy(tokens)))
    pooled = result.text_embeds if projected else result.pooler_output
    arrays |= dict(output=result.last_hidden_state.detach().numpy(), pooled=pooled.detach().numpy())
    save(folder, model, dict(tokens=tokens.astype(np.int32), **arrays))


def make_vision(folder: Path) -> None:
    config = transformers.CLIPVisionConfig(**TINY, image_size=28, patch_size=7, projection_dim=16, hidden_act="gelu")
    model = scatter(transformers.CLIPVisionModelWithProjection(config), 2)
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn((2, 3, 28, 28), generator=generator)
    block = model.vision_model.encoder.layers[-1]
    arrays, result = states_and_gradient(model, block, dict(pixel_values=pixels))
    # Pictures on Stable Video Diffusion's way to CLIP.
    pictures = torch.rand((1, 3, 61, 34), generator=generator) * 2 - 1
    resized = _resize_with_antialiasing(pictures, (14, 14))
    processor = transformers.CLIPImageProcessorPil(do_center_crop=False, do_resize=False, do_rescale=False)
    scaled = processor(images=(resized + 1) / 2, do_normalize=True, return_tensors="pt").pixel_values
    images = dict(pixels=pixels, pictures=pictures, resized=resized, scaled=scaled)
    arrays |= {name: value.numpy().transpose(0, 2, 3, 1) for name, value in images.items()}
    arrays |= dict(output=result.image_embeds.detach().numpy())
    save(folder, model, arrays)


def make_t5(folder: Path) -> None:
    config = transformers.T5Config(
        vocab_size=60, d_model=24, d_kv=12, d_ff=32, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=8, relative_attention_max_distance=10,
    )  # fmt: skip
    model = scatter(transformers.T5EncoderModel(config), 4)
    tokens = text_tokens(5, length=20, end=1)
    tokens[0] = np.random.default_rng(6).integers(3, 60, 20)
    mask = np.ones_like(tokens, bool)
    mask[1:, 11:] = mask[2:, 5:] = False
    tokens[~mask] = 0
    inputs = dict(input_ids=torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask.astype(np.int64)))
    arrays, result = states_and_gradient(model, model.encoder.block[-1], inputs)
    arrays |= dict(tokens=tokens.astype(np.int32), mask=mask, output=result.last_hidden_state.detach().numpy())
    save(folder, model, arrays)
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("\u2581", -2.0),
        ("\u2581red", -1.5),
        ("\u2581circle", -1.7),
    ]
    letters = [(letter, -3.0 - 0.01 * index) for index, letter in enumerate("abcdefghijklmnopqrstuvwxyz!,?'12")]
    vocab = [*pieces, *letters, ("in", -2.5), ("over", -2.1)]
    tokenizer = transformers.T5Tokenizer(vocab=vocab, extra_ids=0)
    tokenizer.save_pretrained(folder)
    save_prompts(folder, tokenizer, 20)


def make_clip_tokenizer(folder: Path, pad: str) -> None:
    """vocab.json, merges.txt and the two json files, as they lie beside the text encoders of diffusion models."""
    letters = ["!", *sorted(set(ByteLevel.alphabet()) - {"!"})]
    words = [["r", "e", "d"], ["c", "i", "r", "c", "l", "e"], ["m", "o", "v", "i", "n", "g"], ["o", "v", "e", "r"]]
    merges, pieces = [], []
    for word in words:
        left = word[0]
        for index, letter in enumerate(word[1:]):
            right = letter + ("</w>" if index == len(word) - 2 else "")
            merges.append((left, right))
            left += right
            pieces.append(left)
    vocab = {token: index for index, token in enumerate([*letters, *(f"{letter}</w>" for letter in letters), *pieces])}
    vocab |= {"<|startoftext|>": len(vocab), "<|endoftext|>": len(vocab) + 1}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def entry(token: str) -> dict:
        return dict(content=token, lstrip=False, normalized=True, rstrip=False, single_word=False)

    ends = dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>")
    special = {**{role: entry(token) for role, token in ends.items()}, "pad_token": pad}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    settings = {role: {"__type": "AddedToken", **entry(token)} for role, token in ends.items()}
    settings |= dict(pad_token="<|endoftext|>", model_max_length=24, tokenizer_class="CLIPTokenizer", errors="replace")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    save_prompts(folder, transformers.CLIPTokenizer.from_pretrained(folder), 24)


def save_prompts(folder: Path, tokenizer, length: int) -> None:
    out = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=length)
    rows = dict(prompts=PROMPTS, tokens=out["input_ids"], mask=out["attention_mask"])
    (folder / "prompts.json").write_text(json.dumps(rows) + "\n")


def main() -> None:
    make_text(GOLDEN / "tiny_clip_text", projected=False)
    make_text(GOLDEN / "tiny_clip_text_projection", projected=True)
    make_vision(GOLDEN / "tiny_clip_vision")
    make_t5(GOLDEN / "tiny_t5")
    make_clip_tokenizer(GOLDEN / "tiny_clip_tokenizer", pad="<|endoftext|>")
    make_clip_tokenizer(GOLDEN / "tiny_clip_tokenizer_bang", pad="!")
    modules = (torch, transformers, diffusers)
    versions = {module.__name__: module.__version__ for module in modules}
    (GOLDEN / "encoder_versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main()
