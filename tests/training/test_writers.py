"""What the metric writer leaves on disk."""

import io

import numpy as np
from PIL import Image
from tensorboardX.event_file_writer import event_pb2

from vdiff_jax.training.writers import MetricWriter


def events(path):
    """The events of a TensorBoard file: length (8 bytes), crc (4), payload, crc (4)."""
    data = path.read_bytes()
    while data:
        length = int.from_bytes(data[:8], "little")
        event = event_pb2.Event()
        event.ParseFromString(data[12 : 12 + length])
        yield event
        data = data[16 + length :]


def test_a_clip_is_an_animated_gif_on_the_board(tmp_path):
    frames = np.zeros((2, 3, 8, 10, 3), np.uint8)
    frames[1, 2] = 255
    writer = MetricWriter(tmp_path)
    writer.video(7, "samples", frames, fps=8.0)
    writer.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    (event,) = [event for event in events(path) if event.HasField("summary")]
    assert event.step == 7 and event.summary.value[0].tag == "samples"
    gif = Image.open(io.BytesIO(event.summary.value[0].image.encoded_image_string))
    assert gif.size == (20, 8)
    gif.seek(gif.n_frames - 1)
    last = np.asarray(gif.convert("RGB"))
    assert last[:, :10].max() < 10 and last[:, 10:].min() > 245
