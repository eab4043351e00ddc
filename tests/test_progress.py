"""Progress lines."""

from vdiff_jax.progress import ProgressTimer


def test_progress_tells_the_time_left(capsys):
    times = iter([100.0, 130.0])
    timer = ProgressTimer("alignment iid", clock=lambda: next(times))
    timer(10, 50)
    timer(20, 50)
    assert capsys.readouterr().err.splitlines() == [
        "alignment iid: 10/50 clips",
        "alignment iid: 20/50 clips, 1.5 min left",
    ]
