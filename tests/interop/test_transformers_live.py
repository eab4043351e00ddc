"""Against transformers and diffusers themselves, where they are installed (the extra `oracle`): other random weights
and shapes than the golden ones, both ways."""

import importlib.util
import logging
from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
logging.getLogger("transformers").setLevel(logging.ERROR)

from test_transformers_parity import BLOCK, WHOLE, block_errors, block_gradient, error, load, save  # noqa: E402

from vdiff_jax.interop.tokenizer import load_tokenizer, save_tokenizer  # noqa: E402
from vdiff_jax.models.clip_pixels import clip_pixels, resize_antialiased  # noqa: E402
from vdiff_jax.models.t5_encoder import relative_buckets  # noqa: E402

GOLDEN = Path(__file__).parent.parent / "golden"
_spec = importlib.util.spec_from_file_location("make_encoder_golden", GOLDEN / "make_encoder_golden.py")
golden_script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden_script)

SHAPES = (
    dict(hidden_size=32, intermediate_size=50, num_hidden_layers=3, num_attention_heads=2),
    dict(hidden_size=20, intermediate_size=16, num_hidden_layers=1, num_attention_heads=5, layer_norm_eps=1e-3),
)
TEXT = dict(vocab_size=90, max_position_embeddings=17, bos_token_id=58, pad_token_id=1)


def text_case(shape, act, end, projected):
    config = transformers.CLIPTextConfig(**shape, **TEXT, hidden_act=act, eos_token_id=end, projection_dim=12)
    model = (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config)
    tokens = golden_script.text_tokens(7, rows=4, length=15, end=59 if end != 2 else 89)
    return model, (model.text_model if projected else model).encoder.layers, dict(input_ids=torch.from_numpy(tokens))


def image_case(shape, act, patch, projected):
    config = transformers.CLIPVisionConfig(**shape, hidden_act=act, image_size=30, patch_size=patch, projection_dim=12)
    model = (transformers.CLIPVisionModelWithProjection if projected else transformers.CLIPVisionModel)(config)
    layers = (model.vision_model if projected else model).encoder.layers
    return model, layers, dict(pixel_values=torch.randn(2, 3, 30, 30, generator=torch.Generator().manual_seed(0)))


def t5_case(form, length, heads, layers):
    config = transformers.T5Config(
        vocab_size=90, d_model=24, d_kv=10, d_ff=30, num_layers=layers, num_heads=heads, feed_forward_proj=form
    )
    model = transformers.T5EncoderModel(config)
    tokens = np.random.default_rng(length).integers(2, 90, (3, length))
    mask = np.arange(length)[None] < np.array([length, length // 2, 1])[:, None]
    given = dict(input_ids=torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask.astype(np.int64)))
    return model, model.encoder.block, given


CASES = {
    "text quick_gelu": lambda: text_case(SHAPES[0], "quick_gelu", 2, False),
    "text gelu": lambda: text_case(SHAPES[1], "gelu", 59, False),
    "text gelu_new projected": lambda: text_case(SHAPES[1], "gelu_new", 59, True),
    "text gelu projected": lambda: text_case(SHAPES[0], "gelu", 2, True),
    "image quick_gelu": lambda: image_case(SHAPES[0], "quick_gelu", 10, False),
    "image gelu projected": lambda: image_case(SHAPES[1], "gelu", 5, True),
    "t5 relu": lambda: t5_case("relu", 9, 3, 1),
    "t5 gated, long": lambda: t5_case("gated-gelu", 300, 2, 3),
}


def ours_of(given):
    if "pixel_values" in given:
        return (given["pixel_values"].numpy().transpose(0, 2, 3, 1),)
    tokens = given["input_ids"].numpy().astype(np.int32)
    mask = given["attention_mask"].numpy().astype(bool) if "attention_mask" in given else np.ones(tokens.shape, bool)
    return tokens, mask


@pytest.mark.parametrize("name", CASES)
def test_forward_gradient_and_files_both_ways(tmp_path, name):
    model, layers, given = CASES[name]()
    golden_script.scatter(model, len(name))
    arrays, result = golden_script.states_and_gradient(model, layers[-1], given)
    model.save_pretrained(tmp_path / "theirs")
    component, params = load(tmp_path / "theirs")
    states = component.apply(params, *ours_of(given), method="hidden_states")
    for index, state in enumerate(states):
        assert error(state, arrays[f"state{index}"]) <= (BLOCK if index == 0 else WHOLE), index
    image = "pixel_values" in given
    output = result.get("image_embeds", result.get("pooler_output")) if image else result.last_hidden_state
    assert error(component.apply(params, *ours_of(given)), output.detach()) <= WHOLE
    if name.startswith("text"):
        pooled = result.get("text_embeds", result.get("pooler_output"))
        assert error(component.apply(params, *ours_of(given), method="pooled"), pooled.detach()) <= WHOLE
    arrays |= dict(zip(("pixels",) if image else ("tokens", "mask"), ours_of(given)))
    assert max(block_errors(component, params, arrays)) <= BLOCK
    assert error(block_gradient(component, params, arrays), arrays["gradient"]) <= BLOCK

    save(tmp_path / "ours", component, params)
    reload_and_compare(type(model), tmp_path / "ours", model)
    for dtype in ("float16", "bfloat16"):
        save(tmp_path / dtype, component, params, dtype)
        reload_and_compare(type(model), tmp_path / dtype, model.to(getattr(torch, dtype)), dtype)
        model.float()


def reload_and_compare(kind, folder, model, dtype="float32", **settings):
    again, info = kind.from_pretrained(folder, output_loading_info=True, dtype=getattr(torch, dtype), **settings)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[problem]
    if dtype == "float32":
        expected = model.state_dict()
        assert expected.keys() == again.state_dict().keys()
        for key, value in again.state_dict().items():
            assert torch.equal(value, expected[key]), key


def test_a_bert_goes_back(tmp_path):
    model = transformers.BertModel.from_pretrained(GOLDEN / "tiny_bert", add_pooling_layer=False)
    save(tmp_path, *load(GOLDEN / "tiny_bert"))
    reload_and_compare(transformers.BertModel, tmp_path, model, add_pooling_layer=False)


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 10), (16, 64), (64, 512)])
def test_buckets_of_relative_positions(buckets, max_distance):
    position = torch.arange(900)
    theirs = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket(
        position[None] - position[:, None], num_buckets=buckets, max_distance=max_distance
    )
    np.testing.assert_array_equal(relative_buckets(900, buckets, max_distance), theirs.numpy())


@pytest.mark.parametrize("size", [(576, 1024), (224, 224), (90, 61), (230, 700)])
def test_pixels_on_their_way_to_clip(size):
    pipelines = pytest.importorskip("diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion")
    pictures = torch.rand((1, 3, *size), generator=torch.Generator().manual_seed(0)) * 2 - 1
    theirs = pipelines._resize_with_antialiasing(pictures, (224, 224))
    ours = pictures.numpy().transpose(0, 2, 3, 1)
    assert error(resize_antialiased(ours, 224, 224), theirs.numpy().transpose(0, 2, 3, 1)) <= WHOLE
    processor = transformers.CLIPImageProcessor(do_center_crop=False, do_resize=False, do_rescale=False)
    scaled = processor(images=(theirs + 1) / 2, do_normalize=True, return_tensors="pt").pixel_values
    assert error(jax.jit(clip_pixels)(ours), scaled.numpy().transpose(0, 2, 3, 1)) <= WHOLE


def random_prompts(seed, count=150):
    """Words and stray characters of many scripts, with every kind of white space between them."""
    rng = np.random.default_rng(seed)
    words = ["red", "Circle", "MOVING", "over", "don't", "it's", "they'll", "x1y22", "!", "!!", "...", "a_b", "</w>"]
    words += ["\u00e9", "e\u0301", "\u4e2d\u6587", "\u00df\u0130", "\U0001f600", "\u00bd", "\ufb01n"]
    words += ["<|endoftext|>", "<|STARTOFTEXT|>"]
    spaces = [" ", "  ", "\t", "\n", "\u00a0", "\u2003", "", ", "]
    prompts = []
    for _ in range(count):
        picked = rng.choice(len(words), rng.integers(0, 9))
        prompts.append("".join(words[index] + spaces[rng.integers(len(spaces))] for index in picked))
    return prompts


@pytest.mark.filterwarnings("ignore:the prompt")
@pytest.mark.parametrize("name", ["tiny_clip_tokenizer", "tiny_clip_tokenizer_bang", "tiny_t5"])
def test_tokens_are_those_of_transformers(tmp_path, name):
    kind = transformers.T5Tokenizer if "t5" in name else transformers.CLIPTokenizer
    prompts, ours, theirs = random_prompts(3), load_tokenizer(GOLDEN / name), kind.from_pretrained(GOLDEN / name)
    save_tokenizer(tmp_path, ours)
    for length in (24, 7):
        tokens, mask = ours.encode(prompts, length)
        for tokenizer in (theirs, kind.from_pretrained(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)):
            out = tokenizer(prompts, padding="max_length", truncation=True, max_length=length)
            for prompt, mine, other in zip(prompts, tokens.tolist(), out["input_ids"]):
                assert mine == other, prompt
            np.testing.assert_array_equal(mask, np.array(out["attention_mask"], bool))
    again = kind.from_pretrained(tmp_path)
    assert (again.pad_token_id, again.eos_token_id, again.bos_token_id) == (ours.pad_id, ours.eos_id, ours.bos_id)
    assert "t5" in name or again.model_max_length == 24
