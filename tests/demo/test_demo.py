"""The known-answer cohort: what is planted is there, and the same seed gives the same files."""

import nibabel as nib
import numpy as np
import pytest
from matplotlib.figure import Figure
from nibabel.orientations import aff2axcodes

from brainage_nb.demo.anatomy import template_anatomy
from brainage_nb.demo.cohort import (
    TRUTH,
    attainable_mae,
    draw_planted,
    draw_truth,
    image_path,
    make_demo_cohort,
    mean_predictor_mae,
    oracle_mae,
)
from brainage_nb.demo.scans import (
    CONTRASTS,
    SITES,
    acquire_again,
    aged_head,
    mean_head,
    place_scan,
    planted_anatomy,
)
from brainage_nb.tables.participants import read_table
from brainage_nb.workspace import read_csv, sha256_of

N_SUBJECTS, SEED = 4, 6  # with this seed one of the four has two sessions


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_demo_cohort(tmp_path_factory.mktemp("cohort"), N_SUBJECTS, SEED, voxel_mm=2, n_jobs=1)


@pytest.fixture(scope="module")
def truth(folder):
    return read_csv(folder / TRUTH)


@pytest.fixture(scope="module")
def many():
    return draw_truth(1500, 3, voxel_mm=2)


@pytest.fixture(scope="module")
def anatomy():
    return template_anatomy(2)


def at(anatomy, image, *millimetres):
    index = np.linalg.solve(anatomy.affine, [*millimetres, 1.0])[:3].round().astype(int)
    return image[tuple(index)]


# --- what is drawn --------------------------------------------------------------------------------------


def test_a_subject_does_not_depend_on_how_many_others_there_are(many):
    few = draw_truth(5, 3, voxel_mm=2)
    assert few.equals(many.head(len(few)))


def test_another_seed_gives_other_subjects(many):
    assert not np.isclose(draw_truth(5, 4, voxel_mm=2)["age"][:5], many["age"][:5]).any()


def test_the_usual_cohort_stays_the_one_it_was(many):
    assert "rate" not in many
    row = many.set_index("scan_id").loc["0001":"0003", ["age", "brain_age", "ventricle_mm"]]
    assert row.to_numpy().tolist() == [[36.71, 34.802, 0.63283], [21.69, 15.87, 0.0], [26.78, 28.786, 0.0]]


def test_followed_people_age_at_their_planted_rate_over_two_to_four_visits_some_on_another_scanner():
    truth = draw_truth(300, 3, voxel_mm=2, followed=0.6, rate_sd=0.4)
    assert truth.equals(draw_truth(300, 3, voxel_mm=2, followed=0.6, rate_sd=0.4))
    people = truth.groupby("subject_id")
    rate, visits, span = people["rate"].first(), people.size(), people["age"].agg(np.ptp)
    assert ((visits > 1) == rate.notna()).all() and set(visits) == {1, 2, 3, 4}
    assert 0.5 < rate.notna().mean() < 0.7 and 0.33 < rate.std() < 0.47 and abs(rate.mean() - 1) < 0.1
    assert span[visits > 1].between(1.99, 9.01).all() and truth["age"].between(20, 86).all()
    change = people["brain_age"].last() - people["brain_age"].first()
    np.testing.assert_allclose((change / span)[visits > 1], rate[visits > 1], atol=0.02)
    assert 0.1 < (people["site"].nunique() > 1)[visits > 1].mean() < 0.3


def test_ages_cover_20_to_86_and_sites_sexes_and_second_sessions_occur(many):
    first = many.drop_duplicates("subject_id")
    assert first["age"].between(20, 86).all()
    assert np.histogram(first["age"], bins=6, range=(20, 86))[0].min() > 0.12 * len(first)
    assert set(many["site"]) == set(SITES) and set(many["sex"]) == {"F", "M"}
    assert 0.10 < (many.groupby("subject_id").size() == 2).mean() < 0.20
    assert {"LAS", "PSR", "RAI"} <= set(many["axcodes"])


def test_a_second_session_is_later_in_the_same_person(many):
    pairs = many[many["session_id"] != ""].pivot(index="subject_id", columns="session_id")
    assert ((pairs["age"]["02"] - pairs["age"]["01"]).between(0.7, 4.1)).all()
    assert (pairs["size_x"]["01"] == pairs["size_x"]["02"]).all()
    assert (pairs["gap"]["02"] - pairs["gap"]["01"]).abs().max() < 2.5


def test_the_gap_is_brain_age_minus_age_and_does_not_depend_on_age(many):
    np.testing.assert_allclose(many["gap"], many["brain_age"] - many["age"], atol=2e-3)
    assert abs(np.corrcoef(many["gap"], many["age"])[0, 1]) < 0.08


def test_ventricles_widen_faster_after_60():
    widening = planted_anatomy(np.array([30.0, 40.0, 70.0, 80.0]))["ventricle_mm"]
    assert widening[3] - widening[2] > 2.5 * (widening[1] - widening[0]) > 0


# --- what the head looks like ---------------------------------------------------------------------------


def test_tissues_are_in_the_right_order_of_bright_and_dark(anatomy):
    head = aged_head(anatomy, planted_anatomy(30))
    white, grey = at(anatomy, head, 28, -20, 34), at(anatomy, head, 26, 4, 2)
    fluid, air = at(anatomy, head, 10, 14, 10), at(anatomy, head, 0, 0, 114)
    column = head[49, 57, 60:]  # from the middle of the brain up through the crown
    fat = column.max()
    skull = column[: column.argmax()][-4:].min()
    assert air < 0.03 and skull < 0.2 < fluid < grey < white < fat


def test_between_20_and_86_ventricles_widen_and_the_grey_white_contrast_falls(anatomy):
    young, old = mean_head(anatomy, 20), mean_head(anatomy, 86)
    middle = np.s_[35:64, 40:85, 80:105]
    assert (old[middle] < 0.4).sum() > 1.5 * (young[middle] < 0.4).sum()
    grey = anatomy.grey * (anatomy.sulci < 0.05) > 0.95
    white = anatomy.white * (anatomy.periventricular < 0.01) > 0.95
    contrasts = []
    for age in (20, 86):
        brain = aged_head(anatomy, planted_anatomy(age))[anatomy.brain]
        contrasts.append(brain[white].mean() / brain[grey].mean() - 1)
    assert contrasts[1] < 0.65 * contrasts[0]


# --- what is written ------------------------------------------------------------------------------------


def test_the_scans_are_as_the_truth_says(folder, truth):
    for row in truth.to_dict("records"):
        image = nib.load(folder / image_path(row))
        assert "".join(aff2axcodes(image.affine)) == row["axcodes"]
        voxel_size = nib.as_closest_canonical(image).header.get_zooms()
        np.testing.assert_allclose(voxel_size, [row[f"voxel_{axis}_mm"] for axis in "xyz"], atol=1e-4)
        assert image.get_data_dtype() == np.int16


def test_the_whole_brain_lies_in_every_field_of_view(anatomy, many):
    brain = np.argwhere(anatomy.inside > 0.5)[::50] + [part.start for part in anatomy.brain]
    points = np.c_[brain @ anatomy.affine[:3, :3] + anatomy.affine[:3, 3], np.ones(len(brain))]
    for row in many.head(60).to_dict("records"):
        shape, _, to_template = place_scan(row)
        index = np.linalg.solve(to_template, points.T)[:3].T
        assert ((index >= 0) & (index <= np.array(shape) - 1)).all()


def test_the_tables_read_as_any_participants_table_does(folder, truth):
    table = read_table(folder / "participants.tsv")
    assert list(table["subject_id"]) == list(truth["subject_id"])
    assert list(table["session_id"]) == list(truth["session_id"])
    np.testing.assert_allclose(table["age"], truth["age"])
    assert list(table["sex"]) == list(truth["sex"]) and list(table["site"]) == list(truth["site"])


def test_two_jobs_write_the_same_bytes_as_one(folder, truth, tmp_path):
    again = make_demo_cohort(tmp_path, N_SUBJECTS, SEED, voxel_mm=2, n_jobs=2)
    for path in (image_path(row) for row in truth.to_dict("records")):
        assert sha256_of(again / path) == sha256_of(folder / path), path


def test_a_second_call_writes_only_what_is_missing(folder, truth):
    paths = [folder / image_path(row) for row in truth.to_dict("records")]
    before = {path: (sha256_of(path), path.stat().st_mtime_ns) for path in paths}
    paths[1].unlink()
    make_demo_cohort(folder, N_SUBJECTS, SEED, voxel_mm=2, n_jobs=1)
    assert sha256_of(paths[1]) == before[paths[1]][0]
    assert all(path.stat().st_mtime_ns == before[path][1] for path in paths if path != paths[1])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": 9}, "seed is 6, asked for 9"),
        ({"voxel_mm": 1}, "voxel_mm"),
        ({"n_subjects": 2}, "4 subjects"),
    ],
)
def test_a_folder_with_another_cohort_is_refused(folder, changed, said):
    settings = {"n_subjects": N_SUBJECTS, "seed": SEED, "voxel_mm": 2} | changed
    with pytest.raises(ValueError, match=said):
        make_demo_cohort(folder, **settings)


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "holiday.txt").write_text("x")
    with pytest.raises(ValueError, match="not empty"):
        make_demo_cohort(tmp_path, 2, 1, voxel_mm=2)


def test_a_voxel_size_it_cannot_make_is_refused(tmp_path):
    with pytest.raises(ValueError, match="1 or 2 mm"):
        make_demo_cohort(tmp_path / "new", 2, 1, voxel_mm=1.5)
    assert not (tmp_path / "new").exists()


# --- what can be reached --------------------------------------------------------------------------------


def test_the_oracle_and_the_attainable_mae_are_where_they_are_meant_to_be(many):
    assert 2.8 < oracle_mae(many) < 3.2
    assert 3.2 < attainable_mae(many) < 3.8
    assert 15 < mean_predictor_mae(many) < 18


def test_too_few_subjects_for_the_folds_are_refused(many):
    with pytest.raises(ValueError, match="too few"):
        attainable_mae(many.head(12))


def test_the_figure_shows_the_heads_asked_for(folder, truth):
    figure = draw_planted(folder, truth, Figure(figsize=(11, 10)), 3)
    shown = [ax for ax in figure.axes if ax.images]
    assert len(shown) == 9 and len(figure.axes) == 13
    assert next(ax.get_title() for ax in shown if ax.get_title()).startswith(f"age {truth['age'].min():.0f}")


def test_a_t2w_scan_shows_the_same_head_moved_and_the_t1w_scan_stays_as_it_was(folder, truth, tmp_path):
    made = make_demo_cohort(tmp_path / "both", 1, SEED, voxel_mm=2, n_jobs=1, modalities=("T1w", "T2w"))
    row = truth[truth["subject_id"] == "0001"].iloc[0].fillna("").to_dict()
    t1w, t2w = (nib.as_closest_canonical(nib.load(made / image_path(row, name))) for name in ("T1w", "T2w"))
    assert sha256_of(made / image_path(row)) == sha256_of(folder / image_path(row))
    moved = acquire_again(row, SEED, "T2w", 2)
    assert 0.2 < np.abs(moved["pitch_deg"] - row["pitch_deg"]) < 6
    fluid, white = [], []
    for image, about in ((t1w, row), (t2w, moved)):  # the same points of the template in both
        head = np.asanyarray(image.dataobj)
        to_scan = np.linalg.inv(place_scan(about)[2])
        at = [(to_scan @ [x, y, z, 1])[:3].round().astype(int) for x, y, z in ((-6, -20, 20), (-28, -30, 26))]
        fluid.append(head[tuple(at[0])])
        white.append(head[tuple(at[1])])
    assert fluid[0] < 0.7 * white[0] and fluid[1] > 1.3 * white[1]


@pytest.mark.parametrize("modality", CONTRASTS)
def test_lesions_are_far_clearer_than_on_a_t1w_scan(anatomy, modality):
    few, many = planted_anatomy(40), planted_anatomy(40) | {"lesions": 0.8}
    shown = [
        np.abs(aged_head(anatomy, many, modality=name) - aged_head(anatomy, few, modality=name)).sum()
        for name in ("T1w", modality)
    ]
    assert shown[1] > 1.7 * shown[0]
