"""Overlapping windows: how many, which frames, and how their tokens make a volume."""

import threading
import time

import numpy as np
import pytest

from jaxmed.config import EncodeConfig
from jaxmed.data.windows import ahead, join, patched_windows, token_shape, window_count
from jaxmed.errors import UserError


@pytest.mark.parametrize(("depth", "tokens"), [(9, 2), (12, 2), (17, 3), (21, 3), (23, 3), (24, 3), (25, 4), (241, 31)])
def test_tokens_along_depth(depth, tokens):
    assert token_shape(EncodeConfig(canvas=(32, 48, depth)), (8, 16, 8), 18) == (18, tokens, 2, 6)
    assert len(patched_windows(np.zeros((depth, 2, 4), np.float32))) == tokens - 1


def test_shapes_without_tokens():
    for depth in (1, 8):
        with pytest.raises(UserError, match=f"has {depth} slices; BTB3D's encoder needs at least 9"):
            window_count(depth)
    with pytest.raises(UserError, match="32 x 48 voxels a slice are not a multiple of the encoder's 16 x 32"):
        token_shape(EncodeConfig(canvas=(32, 48, 25)), (8, 16, 32), 18)


def test_windows_overlap_by_one_frame():
    slices = np.arange(23, dtype=np.float32)
    windows = patched_windows(np.broadcast_to(slices[:, None, None], (23, 4, 6)))
    assert [w.shape for w in windows] == [(8, 5, 2, 3)] * 2
    # cropped to slices 1 to 21, of which the first counts twice; the mean of a pair is its LLL
    np.testing.assert_allclose(windows[0][0, :, 1, 2], [1, 2.5, 4.5, 6.5, 8.5])
    np.testing.assert_allclose(windows[1][0, :, 1, 2], [8.5, 10.5, 12.5, 14.5, 16.5])


def test_join_takes_the_first_token_of_the_first_window_alone():
    z = np.arange(3 * 2 * 2 * 4 * 18, dtype=np.float32).reshape(3, 2, 2, 4, 18)
    joined = join(z)
    assert joined.shape == (18, 4, 2, 4)
    for t, (window, token) in enumerate([(0, 0), (0, 1), (1, 1), (2, 1)]):
        np.testing.assert_array_equal(joined[:, t], z[window, token].transpose(2, 0, 1))


def test_ahead_keeps_order_and_bound():
    started, lock = [], threading.Lock()

    def work(item: int) -> int:
        with lock:
            started.append(item)
        time.sleep(0.002 * (item % 3))
        return item * item

    taken = []
    for result in ahead(work, range(11), 3):
        taken.append(result)
        time.sleep(0.005)
        assert len(started) <= len(taken) + 2
    assert taken == [i * i for i in range(11)]
