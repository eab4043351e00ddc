"""Which files of a folder are clips, and the captions that lie beside them; see docs/data.md for the layout."""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from vdiff_jax.data.video_decode import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from vdiff_jax.data.video_write import CLIP_JSON

_NOTES = (".txt", ".json", ".jsonl", ".csv")


def find_clips(folder: Any, single_images: bool) -> Iterator[Any]:
    """Video files, animated images, and folders that hold images but no videos."""
    entries = [p for p in folder.iterdir() if not p.name.startswith(".")]
    animated = (*VIDEO_SUFFIXES, ".gif", ".webp", ".apng")  # the suffix is asked first: `is_file` may go far away
    videos = [p for p in entries if p.suffix.lower() in animated and p.is_file()]
    stills = [p for p in entries if p.suffix.lower() in IMAGE_SUFFIXES and p not in videos and p.is_file()]
    yield from videos
    if (stills and not videos and not single_images) or (folder / CLIP_JSON).is_file():
        yield folder
    elif single_images:
        yield from stills
    files = {*videos, *stills}
    for entry in entries:
        if entry not in files and entry.suffix.lower() not in _NOTES and entry.is_dir():
            yield from find_clips(entry, single_images)


def captions_of(path: Any, name: str, table: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """All captions of a clip, ("",) if it has none: those beside it, else its own of `table` (`read_captions`).

    Raises ValueError for a caption file that is not UTF-8.
    """
    beside = path.parent / (path.name + ".txt") if path.is_dir() else path.with_suffix(".txt")
    if beside.is_file():
        try:
            text = beside.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{beside} is not UTF-8 text ({error.reason}); save it as UTF-8") from error
        return tuple(line.strip() for line in text.splitlines() if line.strip()) or ("",)
    return table.get(name, ("",))


def read_captions(folder: Any, names: set[str]) -> dict[str, tuple[str, ...]]:
    """captions.jsonl or captions.csv -> captions by clip name; rows may name a clip without its suffix.

    Raises ValueError, naming file and line, for rows that are not captions; warns of those without a clip.
    """
    path = next((p for p in (folder / "captions.jsonl", folder / "captions.csv") if p.is_file()), None)
    if path is None:
        return {}
    by_stem = {str(PurePosixPath(name).with_suffix("")): name for name in names}
    table: dict[str, tuple[str, ...]] = {}
    unmatched = []
    for number, row in _rows(path):
        file, caption = row.get("file"), row.get("caption")
        if not isinstance(file, str) or not isinstance(caption, str):
            raise ValueError(f'{path}, line {number}: each row needs "file" and "caption" text, got {row}')
        name = file if file in names else by_stem.get(file)
        if name is None:
            unmatched.append(file)
        else:
            table[name] = (*table.get(name, ()), caption.strip())
    if unmatched:
        warnings.warn(
            f"{path} has captions for {len(unmatched)} clips that are not there: {unmatched[:3]}", stacklevel=2
        )
    return table


def _rows(path: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    with io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="") as file:
        if path.suffix == ".csv":
            reader = csv.DictReader(file)
            if not {"file", "caption"} <= set(reader.fieldnames or ()):
                raise ValueError(
                    f'{path} needs the columns "file" and "caption", its first line is {reader.fieldnames}'
                )
            for row in reader:
                yield reader.line_num, row
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number} is not JSON ({error}); fix or remove it") from error
                yield number, row if isinstance(row, dict) else {}
