"""Pictures show the head the right way round and in proportion."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from brainage_nb.volumes.pictures import montage, plane, show_plane, steps_figure, three_planes


@pytest.fixture
def volume():
    """One bright voxel at the right, front, top corner."""
    made = np.zeros((4, 5, 6), np.float32)
    made[-1, -1, -1] = 1
    return made


@pytest.mark.parametrize("name", ["sagittal", "coronal", "axial"])
def test_right_front_and_top_are_at_the_left_and_upper_edge(volume, name):
    picture, _ = plane(volume, name, position=1.0)
    assert picture[0, 0] == 1
    assert picture.sum() == 1


def test_pixels_keep_the_proportions_of_voxels(volume):
    assert plane(volume, "sagittal", voxel_size=(1, 2, 3))[1] == 1.5
    assert plane(volume, "coronal", voxel_size=(1, 2, 3))[1] == 3
    assert plane(volume, "axial", voxel_size=(1, 2, 3))[1] == 2
    ax = show_plane(volume, "axial", Figure().add_subplot(), voxel_size=(1, 2, 3))
    assert ax.get_aspect() == 2


def test_an_unknown_plane_is_refused(volume):
    with pytest.raises(ValueError, match="coronal"):
        plane(volume, "oblique")


def test_three_planes_share_one_grey_range_and_name_the_sides(volume):
    axes = Figure().subplots(1, 3)
    three_planes(volume, axes)
    assert len({ax.images[0].get_clim() for ax in axes}) == 1
    assert [text.get_text() for text in axes[2].texts] == ["R", "L"]


def test_a_figure_of_steps_has_a_row_each_with_shape_and_voxel_size(volume):
    figure = steps_figure([("first", volume, (1, 2, 3)), ("second", volume, (2, 2, 2))])
    assert len(figure.axes) == 6
    assert figure.axes[0].get_title(loc="left") == "first\n4 x 5 x 6 voxels of 1 x 2 x 3 mm"
    assert not figure.axes[1].texts  # the file's own axes may be any: no side is claimed


def test_a_montage_shows_every_volume_and_says_how_many(volume):
    figure = montage([volume] * 5, [str(n) for n in range(5)], columns=3)
    assert [ax.get_title() for ax in figure.axes[:5]] == ["0", "1", "2", "3", "4"]
    assert "5 volumes" in figure.get_suptitle()
    assert len(montage([volume.astype(np.float16)]).axes) == 1
    with pytest.raises(ValueError, match="titles"):
        montage([volume], ["a", "b"])
    with pytest.raises(ValueError, match="at least one"):
        montage([])
