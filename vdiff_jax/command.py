"""What every script shares: errors in one sentence, exit codes, the compile cache."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from absl import app, flags, logging

USER_ERRORS = (ValueError, OSError, RuntimeError, ImportError)  # ImportError: an extra that is not installed


def use_compile_cache() -> None:
    """Keep compiled programs between runs, unless the environment says where."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "vdiff_jax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def run_script(main: Callable[[list[str]], int | None]) -> None:
    """Run `main(argv)` with absl flags parsed.

    A user's mistake ends with one sentence on stderr and exit code 1; `VDIFF_TRACEBACK=1` shows where it arose. Flag
    errors, unknown configuration keys among them, end the same way.
    """

    use_compile_cache()
    warnings.showwarning = _warn
    logging.set_verbosity(logging.WARNING)  # orbax tells its every move at INFO

    def guarded(argv: list[str]) -> int | None:
        if len(argv) > 1:
            return _fail(f"unexpected argument {argv[1]!r}: options look like --name=value, see --help")
        try:
            return main(argv)
        except USER_ERRORS as error:
            if os.environ.get("VDIFF_TRACEBACK"):
                traceback.print_exc()
            return _fail(_recipe_sentence(str(error)))

    app.run(guarded, flags_parser=_parse)


def prompts_over_time(texts: Sequence[str]) -> dict[int, str]:
    """["0:a circle", "48:a square"] -> {0: "a circle", 48: "a square"}.

    Raises:
        ValueError: a text without a frame number before its first colon.
    """
    prompts: dict[int, str] = {}
    for text in texts:
        frame, colon, prompt = text.partition(":")
        if not colon or not frame.strip().isdigit():
            raise ValueError(f"--prompt_at={text!r}: give FRAME:PROMPT, as 48:a red circle moving left")
        prompts[int(frame)] = prompt.strip()
    return prompts


def lora_updates(texts: Sequence[str]) -> list[tuple[str, float]]:
    """What `--lora` names: `path` or `path:scale` each, as (path, scale).

    Raises:
        ValueError: a scale that is no number.
    """
    updates = []
    for text in texts:
        path, colon, scale = text.rpartition(":")
        try:
            updates.append((path, float(scale)) if colon else (text, 1.0))
        except ValueError as error:
            raise ValueError(f"--lora={text}: give a path, or path:scale with a number") from error
    return updates


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(_fail(str(error)))
    except (AttributeError, KeyError, TypeError, SyntaxError, *USER_ERRORS) as error:  # the recipe and its overrides
        if os.environ.get("VDIFF_TRACEBACK"):
            traceback.print_exc()
        sys.exit(_fail(_recipe_sentence(str(error))))


def _recipe_sentence(text: str) -> str:
    """What ml_collections says about a recipe, without its quoting and its list of attempts; other text unchanged."""
    if "Did you mean" in text:
        return "the recipe has no setting " + text.strip("\"'").replace("\\n", ". ").replace("\\'", "'").strip()
    if "earlier failure to load" in text:
        return f"cannot load the recipe given by --config: {text.strip().splitlines()[-1].strip()}"
    return text


def _warn(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """A warning to the user is a sentence, without the line of code that gave it."""
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def _fail(sentence: str) -> int:
    print(f"error: {' '.join(sentence.split())}", file=sys.stderr)
    return 1
