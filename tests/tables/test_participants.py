"""Participants tables: ages by a stated rule, or a refusal that says what to set."""

import ast
import json
import re
from pathlib import Path

import pandas as pd
import pytest

import brainage_nb
from brainage_nb.cohort.rules import CohortRules
from brainage_nb.parameters import fields_of
from brainage_nb.pipeline import Notebook, notebooks_folder
from brainage_nb.sources.folder import match_scans
from brainage_nb.sources.opening import SourceSettings
from brainage_nb.tables.columns import COLUMN_PARAMETERS
from brainage_nb.tables.files import TableError, read_cells
from brainage_nb.tables.participants import read_table, refused_rows


@pytest.fixture
def table(tmp_path):
    """Write a table and read it."""

    def written(text, name="participants.tsv", encoding="utf-8", sidecar=None, **columns):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
        if sidecar is not None:
            raw = sidecar if isinstance(sidecar, bytes) else json.dumps(sidecar).encode()
            path.with_suffix(".json").write_bytes(raw)
        return read_table(path, **columns)

    return written


def ages(frame):
    return dict(zip(frame["subject_id"], frame["age"], strict=True))


def noted(frame, words):
    return any(words in note for note in frame.attrs["notes"])


# --- files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("participant_id\tage\nsub-01\t35\nsub-02\t41.5\n", "a.tsv"),
        ("\ufeffparticipant_id\tage\r\nsub-01\t35\r\nsub-02\t41.5", "a.tsv"),
        ("participant_id,age\n01,35\n02,41.5\n\n\n", "a.csv"),
        ("participant_id;age\n01;35\n02;41,5\n", "a.csv"),
        ("participant_id,age\n01,35\n02,41.5\n", "a.tsv"),
        ('"participant_id","age"\n"01","35"\n"02","41.5"\n', "a.csv"),
        ("participant_id age\n01 35\n02 41.5\n", "a.txt"),
        ("participant_id\tage\r01\t35\r02\t41.5\r", "a.tsv"),
    ],
)
def test_delimiters_line_ends_quotes_and_decimal_commas_are_found(table, text, name):
    assert ages(table(text, name)) == {"01": 35, "02": 41.5}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252"])
def test_encodings_are_found(table, encoding):
    frame = table("participant_id\tage\tsite\n01\t35\tKöln\n", encoding=encoding)
    assert frame["site"][0] == "Köln"


def test_a_stray_quote_swallows_no_row(table):
    frame = table('participant_id\tage\tnote\n01\t35\t"tall\n02\t36\tx\n03\t37\t"thin\n04\t38\ty\n')
    assert ages(frame) == {"01": 35, "02": 36, "03": 37, "04": 38}


def test_a_workbook_of_either_kind_is_read_from_the_sheet_that_has_ages(tmp_path, shared_data):
    frame = read_table(shared_data / "ixi_hh" / "IXI.xls")
    assert len(frame) == 564
    assert noted(frame, "Sheet 'Table' was read")


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (b"", "empty"),
        (b"../../.git/annex/objects/aa/bb/MD5E-s10--x.tsv/MD5E-s10--x.tsv", "datalad get"),
        (b"/annex/objects/MD5E-s10--x.tsv\n", "datalad get"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 10\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"\x00\x01\x02\x03 binary", "binary"),
        (b"70\n68\n84\n", "header"),
        (b"participant_id\tage\n", "no rows"),
        (b"id,age,sex\n1,35,5,M\n2,36,5,F\n", "Quote"),
        (b"PK\x03\x04 broken", "workbook"),
        (b"People of my study\ncode,jahre\n1,30\n2,31\n", "Remove the lines above the header"),
    ],
)
def test_what_is_no_table_is_refused_with_a_remedy(table, content, remedy):
    with pytest.raises(TableError, match=remedy):
        table(content)


def test_a_link_to_a_file_that_was_not_fetched_is_refused(tmp_path):
    link = tmp_path / "participants.tsv"
    link.symlink_to(tmp_path / ".git" / "annex" / "objects" / "gone")
    with pytest.raises(TableError, match="datalad get"):
        read_table(link)


@pytest.mark.parametrize(
    "above",
    [
        "image03,1\n",
        "# exported on Monday, 3 May\n",
        "Study X demographics,,\n",
        "Study X\n\n# by A, B, C and D\n",
        "sep=,\n",
        "Site,Leeds\nScans,six months apart\n",
    ],
)
def test_lines_above_the_header_are_passed_over_and_noted(table, above):
    frame = table(above + "subjectkey,age,sex\nN1,30,F\nN2,31,M\n", "a.csv")
    assert ages(frame) == {"N1": 30, "N2": 31}
    assert noted(frame, above.splitlines()[0])
    below_tabs = table(above + "subjectkey\tage\tsex\nN1\t30\tF\nN2\t31\tM\n")
    assert ages(below_tabs) == {"N1": 30, "N2": 31}


def test_comments_above_columns_of_other_names_are_passed_over(table):
    how = {"subject_id": "code", "age": "jahre"}
    text = "# exported on Monday, 3 May\ncode,jahre,note\nS1,30,x\nS3,40,a patient by age\n"
    assert ages(table(text, "a.csv", **how)) == {"S1": 30, "S3": 40}
    assert ages(table("#code,jahre\nS1,30\n", "a.csv", **how | {"subject_id": "#code"})) == {"S1": 30}


def test_a_unit_in_a_line_above_the_header_is_asked_for(table):
    text = "Study X (ages in months),\nid,age\nN1,84\n"
    with pytest.raises(TableError, match=r"ages in months.*set age_unit"):
        table(text, "a.csv")
    assert ages(table(text, "a.csv", age_unit="months")) == {"N1": 7}


@pytest.mark.parametrize(
    "text",
    [
        '"id"\t"age"\t"notes"\n"1"\t1\t23\t""\n"2"\t2\t31\t""\n',
        '"id"\t"age"\t"notes"\n"1"\t1\t23\t"late"\n"2"\t2\t31\t""\n',
        "id\tage\tnotes\nsub-1\tA1\t23\t\nsub-2\tA2\t31\t\n",
        '"id" "age"\n"1" 1 23\n"2" 2 31\n',
        "id\tsex\tage\n1\tA1\tF\t23\n2\tA2\tM\t31\n",
        "id\tage\tsex\t\n1\t7\t23\tF\n2\t9\t31\tM\n",
    ],
)
def test_row_names_of_r_do_not_shift_the_columns(table, text):
    with pytest.raises(TableError, match=r"row\.names = FALSE"):
        table(text)


def test_ages_that_equal_the_ids_are_columns_shifted(table):
    with pytest.raises(TableError, match="seem shifted"):
        table("id\tage\tsex\tnotes\n1\t1\t23\tF\n2\t2\t31\tM\n3\t3\t40\tM\n")


@pytest.mark.parametrize("text", ["id,age,sex\n1,30,F,\n2,31,M,\n", "id,age\n1,30,,\n2,31,,\n"])
def test_a_delimiter_at_the_end_of_rows_does_no_harm(table, text):
    assert ages(table(text, "a.csv")) == {"1": 30, "2": 31}


@pytest.mark.parametrize(
    ("labels", "years"),
    [
        ("Participant ID,Age in months,Sex", 7),
        (",months,", 7),
        ("Teilnehmer,Alter in Monaten,Geschlecht", 7),
        ("Participant,Age,Sex\n,(mo),", 7),
        ("Participant ID,Age at scan,Sex", 84),
        ("string,integer,string", 84),
    ],
)
def test_labels_below_the_header_are_no_person_and_their_unit_counts(table, labels, years):
    frame = table(f"id,age,sex\n{labels}\nS1,84,F\nS2,84,M\n", "a.csv")
    assert ages(frame) == {"S1": years, "S2": years}
    assert noted(frame, "line of labels") and not frame.attrs["refused"]


@pytest.mark.parametrize("labels", ["Tunnus,Ikä kuukausina,Sukupuoli", "-,m,-"])
def test_labels_whose_unit_is_not_understood_ask_for_it(table, labels):
    with pytest.raises(TableError, match="set age_unit"):
        table(f"id,age,sex\n{labels}\nS1,84,F\nS2,84,M\n", "a.csv")


def test_a_person_without_a_number_for_an_age_is_no_label(table):
    frame = table("id,age\nS1,adult\nS2,30\n", "a.csv")
    assert list(refused_rows(frame)["subject_id"]) == ["S1"]
    frame = table("id,age,sex\npilot,not recorded,F\nS2,30,F\nS3,31,M\n", "a.csv")
    assert list(refused_rows(frame)["subject_id"]) == ["pilot"]


# --- columns --------------------------------------------------------------------------------------------


AGES = "age Age AGE AGE_AT_SCAN ageyears Age_in_Yrs PatientAge MRIAge âge"


@pytest.mark.parametrize("name", ["Age (years)", *AGES.split()])
def test_the_age_column_is_found_by_its_name(table, name):
    assert ages(table(f"ID\t{name}\n01\t35\n")) == {"01": 35}


@pytest.mark.parametrize(
    "name",
    ["age_of_onset", "Age_at_injury", "mothers_age", "brain_age", "interview_age", "scan_age", "birth_age"],
)
def test_another_age_is_not_taken_for_the_age_at_the_scan(table, name):
    with pytest.raises(TableError, match=f"set age_column='{name}'"):
        table(f"ID\t{name}\n01\t35\n")
    assert ages(table(f"ID\tage\t{name}\n01\t35\t20\n")) == {"01": 35}


@pytest.mark.parametrize("header", ["language", "stage", "usage", "tumor"])
def test_a_table_without_ages_is_refused(table, header):
    with pytest.raises(TableError, match="no column of ages"):
        table(f"participant_id\t{header}\n01\t35\n")


def test_several_ages_are_refused_and_the_message_names_what_to_set(table):
    text = "ID\tAgeCog_W1\tAgeMRI_W1\tAgeMRI_W2\n01\t20\t21\t25\n02\t30\t31\tn/a\n"
    with pytest.raises(TableError, match="age_column='AgeMRI_W1,AgeMRI_W2'"):
        table(text)
    frame = table(text, age="AgeMRI_W1,AgeMRI_W2")
    assert list(zip(frame["subject_id"], frame["session_id"], frame["age"], strict=True)) == [
        ("01", "w1", 21),
        ("02", "w1", 31),
        ("01", "w2", 25),
    ]
    with pytest.raises(TableError, match="several age columns"):
        table("ID\tage\tage_2\n01\t35\t39\n")


def test_two_age_columns_that_agree_are_one_and_others_are_refused(table):
    assert ages(table("ID\tage\tage_months\n01\t7\t90\n")) == {"01": 7}
    with pytest.raises(TableError, match="several age columns"):
        table("ID\tage\tage_at_scan\n01\t35\t39\n")
    assert ages(table("ID\tage\tage_at_scan\n01\t35\t39\n", age="age_at_scan")) == {"01": 39}


def test_columns_can_be_named_and_a_misspelt_name_lists_what_there_is(table):
    text = "code\tyears\tm_or_f\n7\t35\tf\n"
    frame = table(text, subject_id="code", age="years", sex="M or F")
    assert frame.loc[0, ["subject_id", "age", "sex"]].to_list() == ["7", 35, "F"]
    with pytest.raises(TableError, match="Columns: code, years, m_or_f"):
        table(text, subject_id="code", age="yers")


def test_a_role_that_does_not_exist_is_refused(table):
    with pytest.raises(TypeError, match="read_table knows no agee; roles are subject_id, age"):
        table("ID\tage\n1\t30\n", agee="age")


def test_socioeconomic_status_is_no_session(table):
    frame = table(
        "ID,M/F,Age,Educ,SES,CDR\nOAS1_0001_MR1,F,74,2,3,0\nOAS1_0001_MR2,F,74,2,3,0.5\n", "oasis.csv"
    )
    assert list(frame["session_id"]) == ["MR1", "MR2"]
    assert list(frame["subject_id"]) == ["OAS1_0001", "OAS1_0001"]
    assert list(frame["cdr"]) == ["0", "0.5"]


def test_sessions_diagnosis_and_image_ids_of_adni_and_oasis2_are_read(table):
    frame = table(
        '"Image Data ID","Subject","Group","Sex","Age","Visit"\n'
        '"I45117","002_S_0413","CN","F","76","sc"\n"I99999","002_S_0413","CN","F","77","m12"\n',
        "adni.csv",
    )
    assert list(frame["session_id"]) == ["sc", "m12"]
    assert list(frame["image_id"]) == ["I45117", "I99999"]
    assert set(frame["diagnosis"]) == {"CN"}
    frame = table(
        "Subject ID,MRI ID,Group,Visit,M/F,Age\nOAS2_0001,OAS2_0001_MR1,Converted,1,M,87\n", "oasis2.csv"
    )
    assert frame.loc[0, ["subject_id", "session_id", "image_id", "sex"]].to_list() == [
        *("OAS2_0001", "1", "OAS2_0001_MR1", "M")
    ]


def test_the_baseline_age_of_adnimerge_is_not_the_age_at_later_visits(table):
    frame = table("RID,PTID,VISCODE,AGE\n3,011_S_0003,bl,81.3\n3,011_S_0003,m24,81.3\n", "ADNIMERGE.csv")
    assert list(frame["session_id"]) == ["bl"]
    assert "baseline" in refused_rows(frame)["reason"][0]


# --- units ----------------------------------------------------------------------------------------------


def test_a_unit_counts_where_name_sidecar_or_parameter_states_it(table):
    assert ages(table("ID\tage_months\n01\t84\n")) == {"01": 7}
    assert ages(table("ID\tage\n01\t84\n", sidecar={"age": {"Units": "months"}})) == {"01": 7}
    assert ages(table("ID\tage\n01\t84\n", age_unit="months")) == {"01": 7}


@pytest.mark.parametrize(
    "said",
    [
        {"LongName": "Age in months", "Description": "Age at MRI"},
        {"Description": "age of the participant (months)"},
        "participant age in months",
        {"Units": "Months (rounded)"},
        {"Units": "month(s)"},
        {"units": ["mo."]},
        {"Unit": "Monate"},
        {"Description": "Alter in ganzen Monaten"},
        {"Description": "âge en mois"},
        {"LongName": "edad (meses)"},
        {"Description": "возраст в месяцах"},
        {"Description": "Ålder i månader"},
        {"Description": "Age at scan, months; scans were 2 weeks apart"},
        {"Description": "Age at scan months."},
        {"Levels": {"months": "age at scan"}},
    ],
)
def test_months_are_understood_wherever_a_sidecar_says_them(table, said):
    assert ages(table("ID\tage\n01\t84\n", sidecar={"age": said})) == {"01": 7}
    assert ages(table("ID\tAge\n01\t84\n", sidecar={"AGE": said})) == {"01": 7}


@pytest.mark.parametrize(
    "said",
    [
        "age of the participant",
        "Age in years on the day of the scan; scans were 6 months apart",
        "Age in years, rounded to the nearest month",
        "age, several months after the injury",
        {"Units": "a", "Dtype": "f8"},
        {"Units": None, "Description": "n/a"},
    ],
)
def test_other_times_in_a_description_are_no_unit(table, said):
    sidecar = {"age": said, "onset": "age in months", "height": {"Units": "months"}}
    assert ages(table("ID\tage\n01\t84\n", sidecar=sidecar)) == {"01": 84}


@pytest.mark.parametrize(
    "said",
    [
        {"Units": "m"},
        {"Units": "half years"},
        {"Units": "kuukausi"},
        {"Units": "6 months"},
        {"Units": "years", "LongName": "Age in months"},
        "age in years and months",
        "age, months after the injury",
        "age at the first session; sessions were parted by weeks",
        "age in weeks since the last menstrual period",
        {"Description": "gestational age at scan (weeks)"},
    ],
)
def test_a_unit_that_is_said_and_not_clear_is_asked_for(table, said):
    with pytest.raises(TableError, match=r"(set|or) age_unit"):
        table("ID\tage\n01\t84\n", sidecar={"age": said})
    frame = table("ID\tage\n01\t84\n", sidecar={"age": said}, age_unit="months")
    assert ages(frame) == {"01": 7}


@pytest.mark.parametrize("form", ["trailing comma", "latin-1", "utf-16", "list", "nested"])
def test_a_sidecar_of_another_form_or_encoding_is_read(table, form):
    said = {"age": {"Units": "months", "Description": "âge"}}
    text = json.dumps(said, ensure_ascii=False)
    raw = {
        "trailing comma": text.replace("}}", ",},}").encode(),
        "latin-1": text.encode("latin-1"),
        "utf-16": text.encode("utf-16"),
        "list": json.dumps([{"name": "age", "units": "months"}]).encode(),
        "nested": json.dumps({"participants": said}).encode(),
    }[form]
    assert ages(table("ID\tage\n01\t84\n", sidecar=raw)) == {"01": 7}


def test_a_sidecar_that_cannot_be_read_is_named(table):
    broken = b'{"age": {"Units": "mon'
    with pytest.raises(TableError, match=r"participants\.json.*set age_unit"):
        table("ID\tage\n01\t84\n", sidecar=broken)
    frame = table("ID\tage_months\n01\t84\n", sidecar=broken)
    assert ages(frame) == {"01": 7} and noted(frame, "participants.json")


@pytest.mark.parametrize(
    "name",
    [
        *("Age (mo)", "AgeMonths", "age_mois", "alter_monate", "edad_meses", "Age [Monate]", "agemonths"),
        *("âge en mois", "月龄", "Age at scan (mo.)"),
    ],
)
def test_a_unit_in_the_name_is_understood(table, name):
    assert ages(table(f"ID\t{name}\n01\t84\n")) == {"01": 7}


@pytest.mark.parametrize(
    "name",
    ["Age[m]", "age_m", "Age (kk)", "GA_weeks", "gestational_age", "PMA", "interview_age", "age_decades"],
)
def test_a_named_column_whose_unit_is_not_clear_asks_for_it(table, name):
    text = f"ID\t{name}\n01\t84\n"
    with pytest.raises(TableError, match="age_unit"):
        table(text, age=name)
    assert ages(table(text, age=name, age_unit="months")) == {"01": 7}


def test_each_row_has_the_unit_that_a_column_of_units_says(table):
    frame = table("id,age,age_unit\na,7,years\nb,84,months\nc,3,\nd,4,eons\n", "a.csv")
    assert ages(frame) == {"a": 7, "b": 7}
    assert [row["reason"] for row in frame.attrs["refused"]] == [
        "3: its unit is not said",
        "4: its unit 'eons' is not one of years, months, weeks, days",
    ]
    assert ages(table("id,age,unit\na,7,ICU\nb,8,ER\n", "a.csv")) == {"a": 7, "b": 8}
    coded = {"unit": {"Levels": {"1": "years", "2": "months"}}}
    assert ages(table("id,age,unit\na,7,1\nb,84,2\n", "b.csv", sidecar=coded)) == {"a": 7, "b": 7}


def test_of_several_ages_that_at_the_t1_weighted_scan_counts(table):
    assert ages(table("id\tage\tage_T1w\tage_dwi\tage_phenotype\n1\t9\t10\t14\t18\n")) == {"1": 10}
    header = "participant_id\tage_ses-T1_phenotype\tage_ses-T1_T1w\tage_ses-T1_dwi\tage_ses-T2_T1w\n"
    text = header + "sub-001\t10.24\t10.58\t10.62\t13.82\n"
    with pytest.raises(TableError, match="age_column='age_ses-T1_T1w,age_ses-T2_T1w'"):
        table(text)
    assert list(table(text, age="age_ses-T1_T1w,age_ses-T2_T1w")["age"]) == [10.58, 13.82]


def test_other_ways_to_write_an_age_are_noted_once_a_kind_and_flag_no_row(table):
    frame = table("ID\tage\n1\t35,5\n2\t36,25\n3\t011M\n4\t40\n")
    assert noted(frame, "Ages not written as plain years: 2 (decimal comma)")
    assert noted(frame, "Ages not written as plain years: 1 (011 months / 12)")
    assert set(frame["age_note"]) == {""}


def test_numbers_that_cannot_be_years_are_refused_until_the_unit_is_set(table):
    text = "ID\tage\n" + "".join(f"{i}\t{age}\n" for i, age in enumerate([250, 301, 98, 410]))
    with pytest.raises(TableError, match="set age_unit"):
        table(text, "other.tsv")
    with pytest.raises(TableError, match="set age_unit"):
        table("ID\tage\n1\t250\n2\t301\n", "two.tsv")
    children = "ID\tage\n" + "".join(f"{i}\t{age}\n" for i, age in enumerate(range(72, 132, 5)))
    with pytest.raises(TableError, match="set age_unit"):
        table(children, "other.tsv")
    assert table(text, "other.tsv", age_unit="months")["age"].max() == pytest.approx(410 / 12)


def test_ages_counted_from_conception_are_refused(table):
    with pytest.raises(TableError, match="conception"):
        table("ID\tage\n01\t40\n", sidecar={"age": {"Units": "gestational weeks"}})


def test_one_impossible_age_refuses_its_row_only(table):
    frame = table("ID\tage\n01\t35\n02\t999\n03\t-9\n04\t212\n05\t41\n06\t89+\n07\t20-25\n08\tn/a\n")
    assert ages(frame) == {"01": 35, "05": 41}
    reasons = refused_rows(frame).set_index("subject_id")["reason"]
    assert list(reasons.index) == ["02", "03", "04", "06", "07", "08"]
    assert "impossible" in reasons["04"] and "bound" in reasons["06"] and "range" in reasons["07"]


def test_only_groups_or_ranges_are_refused(table):
    with pytest.raises(TableError, match="age groups"):
        table("ID\tage_group\n01\t22-25\n")
    with pytest.raises(TableError, match="is a range"):
        table("ID\tage\n01\t22-25\n02\t26-30\n")


# --- people ---------------------------------------------------------------------------------------------


def test_ids_stay_as_written_without_sub(table):
    frame = table("participant_id\tage\nsub-007\t35\n12\t36\nSUB-ab\t37\n")
    assert list(frame["subject_id"]) == ["007", "12", "ab"]
    assert list(frame["table_id"]) == ["sub-007", "12", "SUB-ab"]


def test_a_sex_code_counts_only_where_it_is_explained(table):
    assert list(table("ID\tage\tsex\n1\t30\t1\n2\t31\t2\n")["sex"]) == ["", ""]
    assert list(table("ID\tage\tSEX_ID (1=m, 2=f)\n1\t30\t1\n2\t31\t2\n")["sex"]) == ["M", "F"]
    sidecar = {"sex": {"Levels": {"0": "female", "1": "male"}}}
    assert list(table("ID\tage\tsex\n1\t30\t1\n2\t31\t0\n", sidecar=sidecar)["sex"]) == ["M", "F"]
    sidecar["sex"]["Levels"] = {"0": {"Description": "female"}, "1": {"Description": "male"}}
    assert list(table("ID\tage\tsex\n1\t30\t1\n2\t31\t0\n", sidecar=sidecar)["sex"]) == ["M", "F"]
    plain = {"sex": "0=Men, 1=Women", "age": "in years"}
    assert list(table("ID\tage\tsex\n1\t30\t1\n2\t31\t0\n", sidecar=plain)["sex"]) == ["F", "M"]
    words = table("ID\tage\tGender\n1\t30\tWoman\n2\t31\tmale\n3\t32\tO\n4\t33\tn/a\n", "words.tsv")
    assert list(words["sex"]) == ["F", "M", "", ""]
    assert noted(words, "'O'")


def test_repeated_rows_of_one_person_follow_the_stated_rules(table):
    frame = table(
        "ID\tage\tsex\na\t50\tF\na\t50\tF\nb\t61.8\tF\nb\t62.1\tM\nc\t53\tF\nc\t58\tF\nd\t40\tF\nd\tn/a\tF\n"
        "e\t70\tM\ne\t89+\tM\nf\t30\tM\n"
    )
    assert ages(frame) == pytest.approx({"a": 50, "b": 61.95, "d": 40, "f": 30})
    by_id = frame.set_index("subject_id")
    assert by_id["sex"].to_dict() == {"a": "F", "b": "", "d": "F", "f": "M"}
    assert by_id["age_note"]["b"].startswith("mean of 61.80 and 62.10")
    assert by_id["age_note"]["a"] == ""
    assert list(refused_rows(frame)["subject_id"]) == ["c", "e"]


def test_sessions_stay_one_row_each(table):
    frame = table("participant_id\tsession\tage\nsub-01\tses-1\t20.9\nsub-01\tses-2\t22.9\n")
    assert list(frame["session_id"]) == ["1", "2"]
    assert list(frame["age"]) == [20.9, 22.9]


def test_an_age_that_never_changes_over_sessions_is_noted_also_where_others_do(table):
    frame = table("ID\tsession\tage\n1\t1\t20\n1\t2\t20\n2\t1\t30\n2\t2\t33\n")
    assert noted(frame, "one age in all of their several rows: 1 of 2; it may be that at their first visit")


def test_rows_of_one_person_years_apart_ask_for_the_column_of_visits(table):
    with pytest.raises(TableError, match=r"20\.00 and 24.00; if they are visits, set session_column"):
        table("ID\tage\tround\n1\t20\tA\n1\t24\tB\n")
    frame = table("ID\tage\tround\n1\t20\tA\n1\t24\tB\n", session_id="round")
    assert list(frame["session_id"]) == ["A", "B"] and list(frame["age"]) == [20, 24]


def test_tables_can_be_put_together_although_they_carry_notes(table):
    first, second = table("ID\tage\n1\t20\n2\tn/a\n", "a.tsv"), table("ID\tage\n3\t20\n4\t89+\n", "b.tsv")
    assert len(pd.concat([first, second])) == 2
    assert len(first.merge(second, on="age")) == 1


PROSE = "and aside by has import in it itself of or states stays with"
"""Words after `set` in texts that set nothing."""


def test_messages_tell_to_set_parameters_of_the_first_notebook():
    """Walks every text of the modules that read tables and find sources."""
    more = {*fields_of(SourceSettings), *fields_of(CohortRules)}
    known = {*Notebook(notebooks_folder() / "01_data_access.ipynb").parameters(), *more}
    assert known >= set(COLUMN_PARAMETERS.values())
    told, to_set = [], re.compile(r"\b[Ss]et `?(\w+)|(?:or|as) (\w+(?=={})|\w+_\w+)")
    package = Path(brainage_nb.__file__).parent
    for path in sorted(path for place in ("tables", "sources") for path in package.glob(f"{place}/*.py")):
        for text in texts_of(ast.parse(path.read_text())):
            told += [(path.name, *names) for names in to_set.findall(text)]
    told = [(name, word) for name, *words in told for word in words if word]
    assert len(told) > 20
    prose = set(PROSE.split())
    assert [(name, word) for name, word in told if word not in known | prose] == []


def texts_of(tree):
    """Every text in a module but docstrings; what an f-string fills in as {}."""
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner | docs:
            yield node.value


def test_a_column_that_is_not_there_is_told_by_the_parameter_that_named_it(table):
    for role, parameter in COLUMN_PARAMETERS.items():
        if role != "age_unit":
            with pytest.raises(TableError, match=f"{parameter} = 'nothing' is not a column.*set {parameter}"):
                table("ID\tage\n1\t30\n", **{role: "nothing"})


# --- real tables ----------------------------------------------------------------------------------------


def test_ixi_gives_the_mean_within_a_year_and_refuses_beyond(shared_data):
    frame = read_table(shared_data / "ixi_hh" / "IXI.xls")
    by_id = frame.set_index("subject_id")
    assert frame["subject_id"].is_unique
    assert by_id["age"]["328"] == pytest.approx((61.785079 + 62.083504) / 2, abs=1e-5)
    assert by_id["sex"]["328"] == ""
    assert by_id["sex"]["13"] == "M"
    refused = refused_rows(frame).set_index("subject_id")["reason"]
    assert len(refused) == 29
    assert "53.08 and 58.07" in refused["219"]


def real_tables(shared_data):
    return [path for path in sorted((shared_data / "tables").glob("*.?sv")) if path.name != "SOURCES.tsv"]


def test_every_real_table_gives_ages_that_stand_in_it_or_says_what_to_set(shared_data):
    refused = []
    for path in real_tables(shared_data):
        try:
            frame = read_table(path)
        except TableError as error:
            refused.append(path.stem)
            assert re.search(r"set (age_column|table|age_unit|subject_column)|Add a first row", str(error)), (
                error
            )
            continue
        cells = read_cells(path)[""]
        written = {row[column] for _, row in cells.iterrows() for column in cells if column.lower() == "age"}
        assert {f"{age:g}" for age in frame["age"]} <= {f"{float(c):g}" for c in written if _is_number(c)}, (
            path.name
        )
        assert frame["age"].between(0, 120).all()
        known = len(frame) + len(frame.attrs["refused"])
        assert known == len(cells), path.name
    assert refused == [
        *("BrainScape_BRATS", "BrainScape_CLLD", "BrainScape_HCP1200", "BrainScape_PSED"),
        *("bidsexamples_mrs_fmrs", "brainageR_brains.train_labels", "ds004856"),
    ]


def _is_number(cell):
    return bool(re.fullmatch(r"\d+(\.\d+)?", cell))


def test_each_age_of_a_real_table_is_that_of_its_own_row(shared_data):
    for path in real_tables(shared_data):
        try:
            frame = read_table(path)
        except TableError:
            continue
        cells = read_cells(path)[""]
        name = next(column for column in cells if column.lower() == "age")
        subject = next(
            column for column in cells if column.lower() in ("participant_id", "id", "mr_id", "patient_id")
        )
        own = set(zip(cells[subject], pd.to_numeric(cells[name], errors="coerce"), strict=True))
        assert set(zip(frame["table_id"], frame["age"], strict=True)) <= own, path.name


def test_dallas_lifespan_gives_the_age_at_each_visit_once_its_columns_are_named(shared_data, tmp_path):
    path = shared_data / "tables" / "ds004856.tsv"
    with pytest.raises(TableError) as refused:
        read_table(path)
    named = re.search(r"age_column='(\S+)' for a row per visit", str(refused.value))[1]
    frame = read_table(path, age=named)
    by_visit = frame.pivot_table(index="subject_id", columns="session_id", values="age")
    assert by_visit.loc["1003"].to_dict() == {"w1": 54, "w2": 58, "w3": 63}
    assert by_visit.notna().sum().to_dict() == {"w1": 464, "w2": 300, "w3": 193}
    assert ((by_visit["w2"] - by_visit["w1"]).dropna()).between(2, 8).all()
    names = [f"sub-1003/ses-wave{n}/anat/sub-1003_ses-wave{n}_T1w.nii.gz" for n in (1, 2, 3)]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"")
    assert list(match_scans(tmp_path, path, columns={"age": named}).cohort["age"]) == [54, 58, 63]


def test_real_tables_of_visits_give_the_age_at_each_or_say_that_it_never_changes(shared_data):
    visits = read_table(shared_data / "tables" / "BrainScape_MLStudy.tsv")
    assert list(visits["age"][visits["subject_id"] == "05"]) == [20.9, 23.1, 25.2]
    assert list(visits["session_id"][visits["subject_id"] == "05"]) == ["1", "2", "3"]
    assert noted(read_table(shared_data / "tables" / "BrainScape_CORR.tsv"), "rows: 266 of 275")


CHILDREN = [52, 61, 70, 88]


def write_children(header="id,age,sex", end="", more=("F",) * 4):
    rows = [f"p{n},{age},{cell}\n" for n, (age, cell) in enumerate(zip(CHILDREN, more, strict=True))]
    return f"{header}\n{''.join(rows)}{end}"


@pytest.mark.parametrize(
    "sidecar",
    [
        {"Description": "All ages are in months"},
        {"age_at_scan": {"Units": "months"}},
        {"Alter": {"Units": "Monate"}},
        {"age (months)": {"Description": "of the child"}},
        {"age": {"Units": "http://purl.obolibrary.org/obo/UO_0000035"}},
        {"age": {"Description": "Age (m)"}},
        {"age": {"Description": "monthly age"}},
    ],
)
def test_a_unit_said_elsewhere_in_the_sidecar_is_asked_for(table, sidecar):
    with pytest.raises(TableError, match="set age_unit"):
        table(write_children(), "p.csv", sidecar=sidecar)
    assert table(write_children(), "p.csv", sidecar=sidecar, age_unit="months")["age"][0] == 52 / 12


@pytest.mark.parametrize("name", ["field", "Name", "variable"])
def test_a_list_of_columns_may_name_them_in_other_words(table, name):
    found = table(write_children(), "p.csv", sidecar=[{name: "age", "Unit": "months"}])
    assert list(found["age"]) == [age / 12 for age in CHILDREN]


def test_a_sidecar_with_a_nameless_entry_is_read(table):
    found = table(write_children(), "p.csv", sidecar={"": {"x": "y"}, "age": {"Units": "months"}})
    assert found["age"][0] == 52 / 12


@pytest.mark.parametrize("end", ["# ages in months,,\n", "# age in months\n", "unit,months,\n"])
def test_a_unit_below_the_last_row_is_asked_for(table, end):
    with pytest.raises(TableError, match="set age_unit"):
        table(write_children(end=end), "p.csv")


@pytest.mark.parametrize("name", ["UnitAge", "Alterseinheit", "age_unidad", "time_unit"])
def test_a_column_of_units_may_have_other_names(table, name):
    found = table(write_children(f"id,age,{name}", more=["months"] * 4), "p.csv")
    assert list(found["age"]) == [age / 12 for age in CHILDREN]


def test_a_column_of_units_whose_name_does_not_say_of_what_asks(table):
    with pytest.raises(TableError, match="column 'age_in': months"):
        table(write_children("id,age,age_in", more=["months"] * 4), "p.csv")
    assert table(write_children("id,age,age_in", more=["years"] * 4), "p.csv")["age"][0] == 52


@pytest.mark.parametrize("name", ["Lebensmonate", "Alter in Lebensmonaten"])
def test_months_of_life_are_months(table, name):
    assert table(write_children(), "p.csv", sidecar={"age": {"Description": name}})["age"][0] == 52 / 12


def test_row_names_of_a_part_of_a_table_do_not_shift_the_columns(table):
    rows = "".join(f"{3 * n}\t{20 + n}\t{age}\t5{n}\n" for n, age in enumerate(CHILDREN, 1))
    with pytest.raises(TableError, match="row names"):
        table(f"id\tage\tscore\t\n{rows}")


def test_record_ids_of_redcap_are_ids_and_joined_names_of_ages_are_ages(table):
    found = table(write_children("record_id,ageatscanmonths,sex"), "p.csv")
    assert list(found["age"]) == [age / 12 for age in CHILDREN]
