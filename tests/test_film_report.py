"""The figures of the film report: halves told by the given frames alone, and errors known in closed form."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

PATH = Path(__file__).parent.parent / "benchmarks" / "film_report.py"


@pytest.fixture(scope="module")
def film_report():
    spec = importlib.util.spec_from_file_location("film_report", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def windows(given, ahead):
    """`[n 4 2 2 3]`: two given frames, the second `given` grey levels brighter, and two `ahead` brighter still."""
    levels = np.stack([0 * given, given, given + ahead, given + ahead], axis=1)
    return np.broadcast_to(levels[..., None, None, None], (*levels.shape, 2, 2, 3)).astype(np.uint8)


def test_the_moving_half_is_told_by_what_is_given(film_report):
    given, ahead = np.array([7, 1, 5, 3, 5]), np.array([0, 90, 0, 90, 0])
    half = film_report.moving_half(windows(given, ahead), known=2)
    assert half.tolist() == [True, False, True, False, True]  # the larger half where the number is odd
    assert film_report.moving_half(windows(np.ones(6, int), np.arange(6)), known=2).sum() == 3  # equals are parted, too


def test_figures_are_their_closed_forms(film_report):
    clips = windows(np.array([10, 10, 1, 1]), np.array([8, 8, 2, 2]))
    off = np.array([4, 4, 4, 1])[:, None, None, None, None]  # the rival is off by 8, 8, 2, 2
    result = film_report.scores(clips[:, 2:].astype(np.float32) + off, clips, known=2)
    assert result["wins"] == 0.75
    assert result["moving"]["wins"] == 1.0 and result["still"]["wins"] == 0.5
    decibels = 20 * np.log10(255 / np.array([4, 4, 4, 1]))
    np.testing.assert_allclose(result["mean"], decibels.mean(), rtol=1e-6)
    np.testing.assert_allclose(result["ahead"], [decibels.mean()] * 2, rtol=1e-6)
    np.testing.assert_allclose(result["pooled"], 10 * np.log10(255**2 / (49 / 4)), rtol=1e-6)
    np.testing.assert_allclose(result["still"]["pooled"], 10 * np.log10(255**2 / (17 / 2)), rtol=1e-6)
    assert "moving" not in film_report.scores(clips[:, 1:].astype(np.float32), clips, known=1)
