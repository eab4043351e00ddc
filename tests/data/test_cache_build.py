"""A latent cache built by several processes: killed, gone on, damaged, and always the cache that one process builds."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from vdiff_jax.data.cache_build import build_latent_cache
from vdiff_jax.data.latent_cache import LatentCache
from vdiff_jax.data.loader import Loader
from vdiff_jax.data.sources import SyntheticSource, Windows
from vdiff_jax.data.video_io import VideoError

ROOT = Path(__file__).parent.parent.parent
CLIPS = SyntheticSource(9, Windows(4), 4)
PROGRAM = """
import sys, time
from vdiff_jax.data.cache_build import build_latent_cache
from vdiff_jax.data.sources import SyntheticSource, Windows

folder, index, count, seconds = sys.argv[1:]

def encode(video):
    time.sleep(float(seconds))
    return video[:, :, ::2, ::2]

build_latent_cache(SyntheticSource(9, Windows(4), 4), encode, folder, "abc", process_index=int(index),
                   process_count=int(count), stall_s=60)
"""


def encode(video):
    return video[:, :, ::2, ::2]


def start(folder, index, count, seconds=0.0):
    command = [sys.executable, "-c", PROGRAM, str(folder), str(index), str(count), str(seconds)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "whole"
    build_latent_cache(CLIPS, encode, folder, "abc")
    return contents(folder)


def test_a_killed_process_loses_nothing_that_was_done(tmp_path, whole):
    folder = tmp_path / "cache"
    first, second = start(folder, 0, 2), start(folder, 1, 2, seconds=0.5)
    until(lambda: (folder / "000003.json").exists())
    second.send_signal(signal.SIGKILL)
    second.communicate()
    until(lambda: (folder / "000008.json").exists())  # the first has done its share, and waits
    first.kill()
    first.communicate()
    done = {name: (folder / name).stat().st_mtime_ns for name in contents(folder) if name.endswith(".npy")}
    assert not (folder / "index.json").exists() and {"000000.npy", "000001.npy", "000003.npy"} <= set(done)
    assert "000007.npy" not in done
    (folder / "000005.npy").write_bytes(b"half a fi")  # left by storage without atomic renames
    children = [start(folder, index, 3) for index in range(3)]  # one more than before
    said = [child.communicate(timeout=60)[1] for child in children]
    assert not any(child.returncode for child in children), said
    assert contents(folder) == whole
    for name in set(done) - {"000005.npy"}:
        assert (folder / name).stat().st_mtime_ns == done[name]


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
def test_damage_is_seen_when_read_and_encoded_anew(tmp_path, whole, damage):
    build_latent_cache(CLIPS, encode, tmp_path, "abc")
    path = tmp_path / "000002.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 4
    path.unlink() if damage == "delete" else path.write_bytes(data if damage == "flip" else data[:-50])
    loader = Loader(LatentCache(tmp_path, Windows(4)), None, 9, shuffle=False)
    batch = loader.host_batch_at(0)
    assert batch.names[2] == "synthetic 3" and list(loader.skipped.reasons) == ["synthetic 2"]
    assert "000002.npy" in loader.skipped.reasons["synthetic 2"]
    calls = []
    build_latent_cache(CLIPS, lambda video: calls.append(1) or encode(video), tmp_path, "abc")
    assert len(calls) == 1 and contents(tmp_path) == whole


def test_every_flipped_bit_of_a_window_is_caught(tmp_path, whole):
    build_latent_cache(CLIPS, encode, tmp_path, "abc")
    path, cache = tmp_path / "000000.npy", LatentCache(tmp_path, Windows(4))
    data, rng = path.read_bytes(), np.random.default_rng(0)
    for place in [*range(0, 8 * 128, 3), *rng.integers(8 * 128, 8 * len(data), size=50)]:
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << (place % 8)
        path.write_bytes(flipped)
        try:
            moments = cache[0]["moments"]
        except (OSError, ValueError) as error:
            assert "000000.npy" in str(error)
        else:  # in the words of the header that say nothing
            assert place // 8 < 128
            path.write_bytes(data)
            np.testing.assert_array_equal(moments, cache[0]["moments"])


def test_a_share_that_does_not_come_is_named(tmp_path):
    with pytest.raises(TimeoutError, match=r"4 of 9 clips \(000001.json, 000003.json, .*the folder is on storage"):
        build_latent_cache(CLIPS, encode, tmp_path, "abc", process_index=0, process_count=2, stall_s=0.6)
    with pytest.raises(TimeoutError, match=r"0 of 9 clips \(index.json\)"):
        build_latent_cache(CLIPS, encode, tmp_path, "abc", process_index=1, process_count=2, stall_s=0.6)


class Unreadable:
    """Three clips, the second damaged until it is repaired."""

    damaged = True

    def __len__(self):
        return 3

    def name(self, index):
        return f"clip {index}"

    def read_whole(self, index):
        if index == 1 and self.damaged:
            raise VideoError("clip 1 is damaged; make it again")
        return {"frames": np.full((2, 4, 4, 3), index, np.uint8), "fps": 8.0, "name": f"clip {index}"}


def test_every_process_hears_of_clips_that_cannot_be_read(tmp_path):
    source, reports = Unreadable(), {}

    def build(index):
        reports[index] = build_latent_cache(source, encode, tmp_path, "abc", process_index=index, process_count=2)

    threads = [threading.Thread(target=build, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert reports[0].reasons == reports[1].reasons == {"clip 1": "clip 1 is damaged; make it again"}
    assert len(LatentCache(tmp_path, Windows(2))) == 2
    source.damaged = False
    (tmp_path / "index.json").unlink()
    assert build_latent_cache(source, encode, tmp_path, "abc").count == 0
    assert len(LatentCache(tmp_path, Windows(2))) == 3


@pytest.mark.parametrize("first_ends", [True, False])
def test_a_repair_waits_for_every_process(tmp_path, first_ends):
    """What is encoded anew is in the index, whoever is slow, though notes, an index and marks are there from before."""
    source = Unreadable()
    build_latent_cache(source, encode, tmp_path, "abc")
    (tmp_path / "000000.npy").write_bytes(b"damaged")
    for name in (".build.json", ".done.1.json"):  # left by a build that was killed
        (tmp_path / name).write_text('{"build": "old"}')
    source.damaged = False
    reports, waits = {}, threading.Event()

    def build(index):
        if (index == 1) == first_ends:
            waits.wait(60)
        reports[index] = build_latent_cache(
            source, encode, tmp_path, "abc", process_index=index, process_count=2, stall_s=20
        )

    threads = [threading.Thread(target=build, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    assert not reports
    waits.set()
    for thread in threads:
        thread.join(timeout=60)
    assert reports[0].count == reports[1].count == 0
    cache = LatentCache(tmp_path, Windows(2))
    assert [cache[index]["name"] for index in range(len(cache))] == ["clip 0", "clip 1", "clip 2"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
