"""Resampling is exact where the answer is known, and its two ways agree."""

import numpy as np
import pytest

from brainage_nb.volumes.resampling import FWHM_PER_SD, along_axes, gaussian_kernel, resample, smoothing_sd


def turn(degrees, axis=0):
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    a, b = (k for k in range(3) if k != axis)
    made = np.eye(4)
    made[[a, b], [a, b]] = c
    made[a, b], made[b, a] = -s, s
    return made


def test_a_linear_field_is_sampled_exactly_under_any_affine():
    voxels = np.stack(np.meshgrid(*[np.arange(n) for n in (30, 34, 38)], indexing="ij"), -1).astype(float)
    shear = np.eye(4)
    shear[0, 1] = 0.2
    for change in (np.eye(4), turn(20), turn(20, 2) @ shear, np.diag([-1.0, 1, 1, 1])):
        affine = change @ np.diag([1.5, 1.2, 1.0, 1])
        affine[:3, 3] -= affine[:3, :3] @ [15, 17, 19]
        field = (voxels @ affine[:3, :3].T + affine[:3, 3]) @ [1.0, 2.0, -3.0]
        grid = np.diag([1.0, 1, 1, 1])
        grid[:3, 3] = -3.5
        result = resample(field.astype(np.float32), affine, grid, 8)
        wanted = (np.indices((8, 8, 8)).reshape(3, -1).T - 3.5) @ [1.0, 2.0, -3.0]
        assert np.allclose(result.ravel(), wanted, atol=1e-3)


@pytest.mark.parametrize("order", ["C", "F"])
def test_the_parallel_and_the_general_way_agree_with_smoothing_and_beyond_the_edges(order):
    array = np.asarray(np.random.default_rng(0).random((20, 60, 23)), np.float32, order=order)
    affine = np.array([[0, -1.1, 0, 30], [0, 0, 1.3, -12], [0.9, 0, 0, -8], [0, 0, 0, 1]])
    grid = np.diag([2.0, 2, 2, 1])
    grid[:3, 3] = [-34, -20, -18]
    sd = np.array([0.8, 0.6, 0.0])
    straight = resample(array, affine, grid, 24, sd)
    nearly = turn(0.01) @ affine  # moves nothing by a hundredth of a voxel, yet needs three dimensions
    assert np.abs(resample(array, nearly, grid, 24, sd) - straight).max() < 0.02
    assert straight.flags.c_contiguous
    assert straight[0, 0, 0] == 0


def test_a_grid_that_misses_the_volume_is_all_zero():
    far = np.diag([2.0, 2, 2, 1])
    far[:3, 3] = 500
    ones = np.ones((9, 9, 9), np.float32)
    assert not resample(ones, np.eye(4), far, 4).any()
    assert not resample(ones, turn(30), far, 4, np.ones(3)).any()


def test_smoothing_fills_the_gap_between_resolutions_and_never_sharpens():
    assert np.allclose(smoothing_sd([1, 2, 3], 2.0), [np.sqrt(3) / FWHM_PER_SD, 0, 0])
    assert np.allclose(smoothing_sd([0.5, 0.5, 0.5], 2.0) * 0.5 * FWHM_PER_SD, np.sqrt(4 - 0.25))


def test_the_kernel_keeps_the_mean_and_has_the_asked_width():
    kernel = gaussian_kernel(1.5)
    offsets = np.arange(len(kernel)) - len(kernel) // 2
    assert kernel.sum() == pytest.approx(1, abs=1e-4)
    assert (kernel * offsets**2).sum() == pytest.approx(1.5**2 + 1 / 12, rel=0.01)
    assert gaussian_kernel(0.0).tolist() == [1.0]


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_a_matrix_an_axis_is_what_einsum_says(axes):
    rng = np.random.default_rng(0)
    array = rng.random((7, 8, 9), dtype=np.float32).transpose(axes)
    matrices = [rng.random((n // 2, n)) for n in array.shape]
    matrices[0][:, :2] = 0
    wanted = np.einsum("ai,bj,ck,ijk->abc", *matrices, array)
    assert np.allclose(along_axes(array, matrices), wanted, rtol=1e-4)
