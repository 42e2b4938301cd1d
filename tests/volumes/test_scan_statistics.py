"""What a scan is like before preprocessing: each number answers to what it is of, and to nothing harmless."""

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from brainage_nb.volumes.scan_statistics import SCAN_STATISTICS, measure_scan
from tests.volumes.template_head import head, pose

NOISE, SHARP, DARK, EDGE, CUT, SIZE, FACE = 0, 1, 5, 6, 7, 8, 9


@pytest.fixture(scope="module")
def scan():
    image, inside = head(pose())
    return image, inside, measure_scan(image)


def measured(image, array=None, affine=None):
    array = image.get_fdata(dtype=np.float32) if array is None else array
    return measure_scan(nib.Nifti1Image(array.astype(np.float32), image.affine if affine is None else affine))


def test_each_number_is_finite_and_has_a_name(scan):
    assert scan[2].shape == (len(SCAN_STATISTICS),) and np.isfinite(scan[2]).all()
    blank = measure_scan(nib.Nifti1Image(np.ones((20, 20, 20), np.float32), np.diag([4, 4, 4, 1.0])))
    assert np.isfinite(blank).all()


def test_unit_storage_order_and_finer_voxels_make_no_difference(scan):
    image, _, plain = scan
    array = image.get_fdata(dtype=np.float32)
    assert measured(image, 3 * array) == pytest.approx(plain, abs=1e-3)
    flipped = nib.as_closest_canonical(image).slicer[::-1]
    assert measure_scan(flipped) == pytest.approx(plain, abs=1e-3)


def test_noise_blur_thick_slices_and_what_was_cut_are_each_seen(scan):
    image, inside, plain = scan
    array = image.get_fdata(dtype=np.float32)
    noisy = measured(image, array + 40 * np.random.default_rng(0).standard_normal(array.shape)) - plain
    assert noisy[NOISE] > 0.3
    assert measured(image, gaussian_filter(array, 1))[SHARP] < plain[SHARP] - 0.1
    thick = measured(image, array[:, :, ::2], image.affine @ np.diag([1, 1, 2, 1.0]))
    assert thick[EDGE] == pytest.approx(np.log(6)) and plain[EDGE] == pytest.approx(np.log(3))
    assert measured(image, np.where(inside, array, 0))[CUT] > plain[CUT] + 0.5
    with_face, neck = array.copy(), array.copy()
    with_face[32:56, 62:82, 24:40] = neck[36:52, 36:52, :20] = 300
    faced = measured(image, with_face) - plain
    assert faced[FACE] > 3 * faced[SIZE] > 0
    assert (measured(image, neck) - plain)[[SIZE, FACE]] == pytest.approx(0, abs=0.1)
