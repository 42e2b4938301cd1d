"""Grey and white matter: in the template, whose maps are known, under uneven light, and in what is no T1."""

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from brainage_nb.volumes import preprocessing
from brainage_nb.volumes.brain import MARGIN_MM
from brainage_nb.volumes.preprocessing import preprocess
from brainage_nb.volumes.registration import _read_template, signed_distance
from brainage_nb.volumes.resampling import resample, smoothing_sd
from brainage_nb.volumes.scans import ScanError
from brainage_nb.volumes.settings import PreprocessingSettings
from brainage_nb.volumes.tissues import SIZE, SPACING_MM, grid, tissues_of
from tests.volumes.template_head import head, pose

BEST = PreprocessingSettings.of_recipe("best", spacing_mm=4, size=48)


def on_grid(image):
    sd = smoothing_sd(np.ones(3), SPACING_MM)
    return resample(image.get_fdata(dtype=np.float32), image.affine, grid(), SIZE, sd)


@pytest.fixture(scope="module")
def template_brain():
    """The template's brightness, its inside, and its grey and white matter maps, all on `grid()`."""
    from nilearn.datasets import load_mni152_gm_template, load_mni152_wm_template

    t1, mask, affine = _read_template()
    brightness, inside = (on_grid(nib.Nifti1Image(array, affine)) for array in (t1 * mask, mask))
    grey, white = (
        on_grid(load_mni152_gm_template(resolution=1)),
        on_grid(load_mni152_wm_template(resolution=1)),
    )
    return brightness, inside > 0.5, grey, white


def depth(inside):
    """Signed distance as `find_brain` gives it: the mask's surface lies 3 mm outside of the cortex."""
    return signed_distance(inside, SPACING_MM) - MARGIN_MM


def slow_field(log):
    """Brighter to the front and the top, by up to exp(±log)."""
    line = np.linspace(-1, 1, SIZE)
    return np.exp(log * (0.5 * line[:, None] + 0.5 * line**3)).astype(np.float32)[None]


def test_the_templates_tissues_are_those_of_its_own_maps(template_brain):
    brightness, inside, grey, white = template_brain
    found = tissues_of(brightness, depth(inside))
    assert found.problems == ()
    assert np.corrcoef(found.grey[inside], grey[inside])[0, 1] > 0.85
    assert np.corrcoef(found.white[inside], white[inside])[0, 1] > 0.93
    assert (found.grey[~inside] == 0).all()
    assert (found.grey + found.white).max() <= 1 + 1e-5


def test_what_departs_from_the_template_is_seen_where_it_is(template_brain):
    brightness, inside, grey, white = template_brain
    levels = [np.median(brightness[part & inside]) for part in (grey > 0.9, white > 0.9)]
    scan, deep = brightness.copy(), np.zeros(inside.shape, bool)
    deep[33:39, 45:54, 57:63] = True  # white matter above a ventricle turned grey, as in a lesion
    deep &= white > 0.9
    fluid = (grey > 0.8) & (np.indices(inside.shape)[2] > 72)  # the upper cortex gone
    assert deep.sum() > 100 and fluid.sum() > 500
    scan[deep], scan[fluid] = levels[0], 0.25 * levels[0]
    found, before = tissues_of(scan, depth(inside)), tissues_of(brightness, depth(inside))
    assert before.grey[deep].mean() < 0.1 and before.grey[fluid].mean() > 0.8
    assert found.grey[deep].mean() > 0.5 and found.white[deep].mean() < 0.5
    assert found.grey[fluid].mean() < 0.1


def test_uneven_light_and_another_gain_move_no_tissue(template_brain):
    brightness, inside, _, _ = template_brain
    even = tissues_of(brightness, depth(inside)).grey[inside]
    field = slow_field(0.25)
    assert np.ptp(np.log(field)) > 0.45
    lit = tissues_of(brightness * field, depth(inside)).grey[inside]
    brighter = tissues_of(brightness * 1.1, depth(inside)).grey[inside]
    assert np.abs(lit - even).mean() < 0.02
    assert np.abs(brighter - even).mean() < 0.01
    offset = tissues_of(brightness + 0.3, depth(inside)).grey[inside]
    assert np.abs(offset - even).mean() < 1e-3


def test_the_order_of_brightness_of_another_contrast_is_refused(template_brain):
    brightness, inside, _, _ = template_brain
    inverted = np.where(inside, 1.2 - brightness, 0).astype(np.float32)
    assert "T1-weighted" in tissues_of(inverted, depth(inside)).problems[0]
    noise = np.random.default_rng(0).uniform(0.3, 1, brightness.shape).astype(np.float32)
    assert tissues_of(noise, depth(inside)).problems


def test_a_head_and_the_same_without_skull_have_the_same_grey_matter(template_brain):
    brightness, inside, grey, _ = template_brain
    outside, cut = ~inside, np.where(inside, brightness, 0).astype(np.float32)
    around = np.random.default_rng(0).uniform(0.0, 0.6, brightness.shape)  # fluid, bone and marrow
    whole = np.where(outside, around, brightness).astype(np.float32)
    one = tissues_of(whole, depth(inside)).grey[inside]
    other = tissues_of(cut, depth(inside), outside.astype(np.float32)).grey[inside]
    assert np.abs(one - other).mean() < 0.002
    assert np.corrcoef(one, grey[inside])[0, 1] > 0.85


def test_fluid_that_another_tool_cut_away_between_the_folds_is_fluid_all_the_same(template_brain):
    brightness, inside, grey, white = template_brain
    fluid = inside & (depth(inside) > -12) & (grey + white < 0.3)
    assert fluid.sum() > 1000
    share = gaussian_filter(fluid.astype(np.float32), 1) * inside  # of each voxel, the fluid that is cut away
    cut = brightness * inside - share * brightness[fluid].mean()
    whole = tissues_of(brightness, depth(inside)).grey
    one = tissues_of(cut, depth(inside), np.where(inside, share, 1)).grey
    beside = share > 0.2
    assert np.abs(one - whole)[inside].mean() < 0.01
    assert whole[beside].mean() < one[beside].mean() < whole[beside].mean() + 0.06  # none is lost


def test_best_gives_the_grey_matter_of_a_tilted_head(template_brain):
    _, _, grey, _ = template_brain
    truth = resample(grey, grid(), _grid_of(BEST), BEST.size, smoothing_sd(np.full(3, SPACING_MM), 4.0))
    volume = preprocess(head(pose((18, -14, 20), (12, -25, 14)))[0], BEST)
    assert volume.dtype == np.float32
    assert 0 <= volume.min() < 0.01 < 0.8 < volume.max() <= 1
    assert np.corrcoef(volume.ravel(), truth.ravel())[0, 1] > 0.9


def test_a_head_without_contrast_gives_no_volume_but_the_reason():
    image, _ = head(pose())
    voxels = np.asarray(image.dataobj)
    rng = np.random.default_rng(0)
    noisy = voxels + np.where(voxels > 100, rng.normal(0, 400, voxels.shape), 0)
    with pytest.raises(ScanError) as error:
        preprocess(nib.Nifti1Image(noisy.clip(0).astype(np.float32), image.affine), BEST)
    assert error.value.code == "tissues_unclear"


def test_a_field_of_view_without_brain_gives_no_volume(monkeypatch):
    beside = _grid_of(BEST)
    beside[0, 3] += 300  # mm
    monkeypatch.setattr(preprocessing, "_grid", lambda *_: beside)
    with pytest.raises(ScanError, match="outside of the field of view"):
        preprocess(head(pose())[0], BEST)
    assert not tissues_of(np.ones((SIZE,) * 3, np.float32), np.full((SIZE,) * 3, 9.0)).grey.any()


def _grid_of(settings):
    from brainage_nb.volumes.registration import mni_grid

    return mni_grid(settings.spacing_mm, settings.size)
