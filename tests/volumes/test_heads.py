"""The head is found where it is, whatever surrounds it."""

import nibabel as nib
import numpy as np
import pytest

from brainage_nb.volumes.heads import coarse_picture, find_head, head_mask

from .conftest import BRAIN_CENTRE, BRAIN_RADII

CROWN = BRAIN_CENTRE[2] + 1.24 * BRAIN_RADII[2]


def test_crown_and_centre_are_where_the_head_was_put(make_head):
    head = find_head(make_head(2.0))
    assert head.crown_mm == pytest.approx(CROWN, abs=7)
    assert np.allclose(head.centre_mm, BRAIN_CENTRE, atol=[2, 8, 12])


def test_a_longer_neck_moves_nothing(make_head):
    short, long = find_head(make_head(neck_mm=110)), find_head(make_head(neck_mm=200))
    assert np.allclose(short.centre_mm, long.centre_mm, atol=1.0)


def test_noise_bias_and_a_ghost_move_the_centre_by_little(make_head):
    image = make_head()
    clean = find_head(image).centre_mm
    rng = np.random.default_rng(0)
    array = np.asarray(image.dataobj)
    array = array * np.linspace(0.6, 1.4, array.shape[0])[:, None, None] + 0.06 * np.roll(array, 30, axis=1)
    noisy = np.hypot(array + rng.normal(0, 40, array.shape), rng.normal(0, 40, array.shape))
    assert np.allclose(find_head(nib.Nifti1Image(noisy, image.affine)).centre_mm, clean, atol=5)


def test_a_background_that_is_not_zero_is_background(make_head):
    image = make_head()
    shifted = nib.Nifti1Image(np.asarray(image.dataobj) - 1024, image.affine)
    assert np.allclose(find_head(shifted).centre_mm, find_head(image).centre_mm, atol=1e-3)


def test_the_coarse_picture_is_the_same_for_any_storage_order(make_head):
    image = make_head(2.0)
    picture, affine = coarse_picture(np.asarray(image.dataobj), image.affine)
    for axes in (("L", "P", "S"), ("P", "S", "R"), ("A", "I", "L")):
        change = nib.orientations.ornt_transform(
            nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(axes)
        )
        stored = image.as_reoriented(change)
        other, other_affine = coarse_picture(np.asarray(stored.dataobj), stored.affine)
        assert np.allclose(other, picture, atol=1e-2)
        assert np.allclose(other_affine, affine)


def test_the_coarse_picture_keeps_world_positions():
    affine = np.diag([1.0, 2.0, 1.5, 1.0])
    affine[:3, 3] = [-30, 10, 5]
    world = np.stack(np.meshgrid(*[np.arange(n) for n in (40, 22, 31)], indexing="ij"), -1) * [1, 2, 1.5]
    world += affine[:3, 3]
    for axis in range(3):
        picture, coarse = coarse_picture(world[..., axis], affine)
        index = np.argwhere(np.ones(picture.shape))
        assert np.allclose((index @ coarse[:3, :3].T + coarse[:3, 3])[:, axis], picture.ravel(), atol=1e-3)


def test_a_brain_alone_is_called_skull_stripped_and_a_head_is_not(make_head):
    assert find_head(make_head(brain_only=True)).skull_stripped
    assert not find_head(make_head()).skull_stripped


def test_a_cut_side_is_named_and_a_neck_is_no_cut(make_head):
    image = make_head()
    assert find_head(image).cut_off == ()
    array, affine = np.asarray(image.dataobj), image.affine
    for axis, (low, high) in enumerate((("left", "right"), ("back", "front"))):
        half = array.shape[axis] // 2
        kept = np.take(array, range(half, array.shape[axis]), axis)
        assert low in find_head(nib.Nifti1Image(kept, affine)).cut_off
        assert high in find_head(nib.Nifti1Image(np.take(array, range(half), axis), affine)).cut_off
    assert "top" in find_head(nib.Nifti1Image(array[:, :, :50], affine)).cut_off
    assert "bottom" in find_head(nib.Nifti1Image(array[:, :, 40:], affine)).cut_off


def test_volume_and_extent_are_those_of_the_ellipsoid(make_head):
    head = find_head(make_head(2.0, brain_only=True))
    assert head.volume_l == pytest.approx(4 / 3 * np.pi * np.prod(BRAIN_RADII) / 1e6, rel=0.1)
    assert np.allclose(head.extent_mm, 2 * BRAIN_RADII, atol=9)


def test_tiny_and_odd_images_give_an_answer():
    rng = np.random.default_rng(0)
    for shape in ((1, 1, 2), (7, 5, 3), (64, 64, 1), (2, 90, 90)):
        head = find_head(nib.Nifti1Image(rng.random(shape).astype(np.float32), np.diag([2.0, 2, 2, 1])))
        assert np.isfinite([*head.centre_mm, *head.extent_mm, head.crown_mm, head.volume_l]).all(), shape
    assert head_mask(np.zeros((4, 4, 4))).any()
