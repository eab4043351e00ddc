"""A folder of damaged files through the real source and loader: each read or left out with a reason, nothing else.

`benchmarks/mutated_videos.py` does the same with a thousand and more, each read by a process of its own account.
"""

import importlib.util
import resource
from pathlib import Path

import av
import numpy as np
import pytest

from vdiff_jax.data.loader import Loader
from vdiff_jax.data.sources import FolderSource, Windows
from vdiff_jax.data.video_io import Limits, VideoError, probe, read_video

PATH = Path(__file__).parent.parent.parent / "benchmarks" / "video_mutations.py"
spec = importlib.util.spec_from_file_location("video_mutations", PATH)
mutations = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mutations)
FORMATS = (
    "h264.mp4",
    "vp9.webm",
    "mpeg4.avi",
    "mjpeg.mov",
    "mpeg2.ts",
    "palette.gif",
    "animated.apng",
    "animated.webp",
)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    return mutations.make_originals(tmp_path_factory.mktemp("whole"), FORMATS)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_files_are_left_out_with_a_reason_and_whole_ones_read(originals, tmp_path):
    names = mutations.mutate(originals, tmp_path, 55, seed=0)
    for path in originals:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    source = FolderSource(tmp_path, Windows(4), 32)
    loader, read = Loader(source, None, 8), set()
    for batch, _ in zip(loader.host_batches(), range(-(-len(source) // 8))):
        read |= set(batch.names)
        assert batch.arrays["video"].shape == (8, 4, 32, 32, 3) and np.isfinite(batch.arrays["video"]).all()
    reasons = source.skipped.reasons | loader.skipped.reasons
    assert {path.name for path in originals} <= read
    assert set(names) <= read | set(reasons) and len(source.skipped.reasons) > 20
    assert all(reason and "\n" not in reason for reason in reasons.values())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 * 1024  # kilobytes


def test_a_codec_that_is_not_known_is_a_sentence(originals, tmp_path):
    data = next(path for path in originals if path.name == "vp9.webm").read_bytes()
    (tmp_path / "a.webm").write_bytes(data.replace(b"V_VP9", b"V_XP9"))
    with pytest.raises(VideoError, match=r"a.webm holds video of a codec that is not known here; convert it"):
        probe(tmp_path / "a.webm")


def test_a_frame_that_is_larger_than_the_header_says_is_refused_by_the_decoder(tmp_path):
    """An mpeg stream of two sizes: the second is told only by its own sequence header, in the middle."""
    for name, size in (("small", 32), ("large", 512)):
        with av.open(str(tmp_path / name), "w", format="mpeg2video") as container:
            stream = container.add_stream("mpeg2video", rate=25)
            stream.height = stream.width = size
            stream.pix_fmt = "yuv420p"
            for level in range(0, 240, 20):
                frame = np.full((size, size, 3), level, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    path = tmp_path / "both.mpg"
    path.write_bytes((tmp_path / "small").read_bytes() + (tmp_path / "large").read_bytes())
    assert probe(path).height == 32
    frames = read_video(path, size=32).num_frames
    with pytest.raises(VideoError) as caught:
        read_video(path, size=32, num_frames=frames, limits=Limits(max_pixels=64 * 64))
    assert "both.mpg" in str(caught.value) and "512 x 512" not in str(caught.value)  # no such frame was ever made
