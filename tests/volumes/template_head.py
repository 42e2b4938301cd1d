"""A scan made of the MNI152 template, in a known pose, with an invented scalp."""

import nibabel as nib
import numpy as np
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from brainage_nb.volumes.registration import template

VOXEL_MM = 3.0
SIZE = 88


def pose(degrees=(0, 0, 0), move_mm=(0, 0, 0), scale=(0.98, 0.87, 0.92)):
    """Map (4, 4) from MNI152 to the scanner."""
    made = np.eye(4)
    made[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix() @ np.diag(scale)
    made[:3, 3] = move_mm
    return made


def head(to_scan, *, brain_only=False):
    """The template as a scan, with a bright scalp; the image and its inside of the skull."""
    onto = template(2.0)
    skin = (onto.depth_mm > 8) & (onto.depth_mm < 14)
    drawn = onto.brain if brain_only else np.where(skin, 0.8, np.where(onto.depth_mm < 14, onto.painted, 0))
    affine = np.diag([VOXEL_MM] * 3 + [1.0])
    affine[:3, 3] = to_scan[:3, 3] - VOXEL_MM * (SIZE - 1) / 2
    to_template = np.linalg.inv(to_scan @ onto.affine) @ affine
    voxels = np.indices((SIZE,) * 3).reshape(3, -1)
    places = to_template[:3, :3] @ voxels + to_template[:3, 3:]
    picture = map_coordinates(drawn, places, order=1).reshape((SIZE,) * 3)
    noise = 0.01 * np.random.default_rng(0).standard_normal(picture.shape)
    inside = map_coordinates(onto.depth_mm, places, order=1, cval=50.0).reshape((SIZE,) * 3) < 3
    return nib.Nifti1Image((500 * (picture + noise)).astype(np.float32), affine), inside


def shuffled(image):
    """The same voxels in random places."""
    voxels = np.random.default_rng(1).permutation(np.asarray(image.dataobj).ravel())
    return nib.Nifti1Image(voxels.reshape(image.shape), image.affine)
