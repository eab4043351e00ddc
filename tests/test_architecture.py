"""The rules of the house, read from the syntax trees: what never imports what, file sizes, docstrings."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vdiff_jax"
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
HEAVY = {
    "tensorflow", "tensorflow_datasets", "torch", "gradio", "cv2", "sentence_transformers", "transformers", "diffusers",
    "huggingface_hub", "fastapi", "uvicorn", "matplotlib", "ray",
}  # fmt: skip
DERIVES_FROM_TFDS = "vdiff_jax.data.tfds_builders"  # needs its base class; hence as heavy as TFDS itself

# A room and the only rooms (or top modules) of the package it may import, itself included.
MAY_IMPORT = {
    "diffusion": {"diffusion", "types"},
    "sampling": {"sampling", "diffusion", "types"},
    "models": {"models", "types"},
    "editing": {"editing", "sampling", "diffusion", "types"},
    "training": {"training", "diffusion", "parallel", "types"},
}
# A room and rooms it must not import.
NEVER = {"data": {"models", "training", "sampling", "editing", "pipeline"}}
INTEROP_USERS = {"interop", "pipeline", "stages"}


def source_files(*folders: str) -> list[Path]:
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted(files + list(ROOT.glob("*.py")))


def imports(tree: ast.Module, module: str, *, top_only: bool = False) -> set[str]:
    """Dotted names a module imports, those inside functions too; `from a import b` counts as a and a.b."""
    found: set[str] = set()
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], base]).rstrip(".")
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif top_only and isinstance(node, (ast.Try, ast.If)):
            found |= imports(ast.Module(node.body + node.orelse, []), module, top_only=True)
    return found


def rooms(names: set[str]) -> set[str]:
    """Rooms and top modules of the package among dotted names."""
    parts = [name.split(".") for name in names]
    return {part[1] for part in parts if part[0] == "vdiff_jax" and len(part) > 1 and part[1] != "__version__"}


def breaches(module: str, tree: ast.Module) -> list[str]:
    """Every import rule that a module of the package breaks."""
    names = imports(tree, module)
    top = {name.split(".")[0] for name in names}
    room, used = module.split(".")[1], rooms(names)
    wrong = []
    if "flax" in top and room != "models":
        wrong.append("imports flax")
    wrong += [f"imports {name}" for name in sorted(used - MAY_IMPORT.get(room, used))]
    wrong += [f"imports {name}" for name in sorted(used & NEVER.get(room, set()))]
    wrong += [f"imports {name}" for name in sorted(top & ({"configs"} | SCRIPTS))]
    if "service" in used and room != "service":
        wrong.append("imports service")
    if "interop" in used and room not in INTEROP_USERS:
        wrong.append("imports interop")
    if top & {"torch", "tensorflow", "cv2"} - ({"tensorflow"} if room == "data" else set()):
        wrong.append("imports torch, tensorflow or cv2")
    at_top = imports(tree, module, top_only=True)
    heavy = {name for name in at_top if name.split(".")[0] in HEAVY or name == DERIVES_FROM_TFDS}
    if module != DERIVES_FROM_TFDS:
        wrong += [f"imports {name} at its top" for name in sorted(heavy)]
    return wrong


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=module_name)
def test_no_module_imports_what_it_must_not(path):
    assert breaches(module_name(path), ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("vdiff_jax.pipeline", "from flax import nnx"),
        ("vdiff_jax.diffusion.loss", "def f():\n    from vdiff_jax.models.unet import VideoUNet"),
        ("vdiff_jax.sampling.job", "import vdiff_jax.data.loader"),
        ("vdiff_jax.sampling.job", "from vdiff_jax import data"),
        ("vdiff_jax.models.unet", "from vdiff_jax.diffusion.process import alpha_sigma"),
        ("vdiff_jax.training.loop", "from ..evaluation import metrics"),
        ("vdiff_jax.data.loader", "from vdiff_jax.training.step import TrainState"),
        ("vdiff_jax.evaluation.metrics", "from vdiff_jax.interop import weights"),
        ("vdiff_jax.stages", "import train"),
        ("vdiff_jax.recipe", "from configs.shapes import get_config"),
        ("vdiff_jax.pipeline", "from vdiff_jax.service import api"),
        ("vdiff_jax.evaluation.metrics", "try:\n    import tensorflow as tf\nexcept ImportError:\n    pass"),
        ("vdiff_jax.evaluation.metrics", "import matplotlib.pyplot"),
        ("vdiff_jax.pipeline", "def f():\n    import torch"),
        ("vdiff_jax.data.tfds_source", "from vdiff_jax.data import tfds_builders"),
    ],
)
def test_the_rules_catch_a_breach(module, code):
    assert breaches(module, ast.parse(code))


def test_a_script_and_a_recipe_import_no_other_and_no_flax():
    for path in [*ROOT.glob("*.py"), *(ROOT / "configs").glob("*.py")]:
        top = {name.split(".")[0] for name in imports(ast.parse(path.read_text()), path.stem)}
        others = SCRIPTS | {"flax", "torch"} | (set() if path.parent.name == "configs" else {"configs"})
        assert not top & (others - {path.stem}), path.name


def test_files_are_named_sized_and_explained():
    files = source_files("vdiff_jax", "configs", "benchmarks", "tests")
    assert len(files) > 60
    for path in files:
        text = path.read_text()
        assert path.name not in ("utils.py", "helpers.py", "misc.py", "common.py"), path
        assert text.count("\n") <= 500, f"{path} has {text.count(chr(10))} lines: split it"
        if text.strip():
            assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
