"""What each source needs, under which terms its data stand, and what to cite. Reads no data.

Licences and citations were read from the publishers' papers and from public code and data cards; the
publishers' own pages may have changed since, and they are what counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Terms:
    """Where data come from and what is owed for them.

    Attributes
    ----------
    name : str
        The data set in words.
    needs : str
        What a person has to have or to set.
    licence : str
        The terms of use.
    cite : str
        What a publication has to name.
    url : str
        The publisher's page, where the terms stand in full.
    caution : str
        What to know before figures are compared, or "".
    """

    name: str
    needs: str
    licence: str
    cite: str
    url: str = ""
    caution: str = ""

    def with_facts(self, **facts: str) -> Terms:
        """The same terms with what the data set itself says, where it says something."""
        return replace(self, **{name: text for name, text in facts.items() if text})

    def line(self) -> str:
        """The terms as one line, for a log."""
        return f"{self.name}. Terms of use: {self.licence}. Cite: {self.cite}."

    def markdown(self) -> str:
        """The terms as a short list, for a notebook or a terminal."""
        lines = [f"**{self.name}**", "", f"- **Terms of use:** {self.licence}", f"- **Cite:** {self.cite}"]
        lines += [f"- **Publisher:** <{self.url}>"] if self.url else []
        lines += [f"- **Mind:** {self.caution}"] if self.caution else []
        return "\n".join(lines)


_OASIS = "https://sites.wustl.edu/oasisbrains/"
_OASIS_TERMS = (
    "OASIS Data Use Agreement (accept it on the publisher's page before you download; no attempt to identify "
    "anybody; keep the acknowledgement in what you publish)"
)
_OASIS_GRANTS = "P50 AG05681, P01 AG03991, P01 AG026276, R01 AG021910, P20 MH071616, U24 RR021382"

TERMS = {
    "demo": Terms(
        "Known-answer heads, made here",
        "nothing",
        "yours; the anatomy is the MNI152 template that nilearn ships, whose notice allows use, copying and "
        "change",
        "Fonov et al. 2011, NeuroImage 54:313-327, doi:10.1016/j.neuroimage.2010.07.033 (the template)",
        caution="a test object: figures on it say nothing about people",
    ),
    "folder": Terms(
        "Your own folder",
        "`data_dir` (a Drive folder too) and `table`",
        "those under which you hold the data; check that your ethics approval covers this use",
        "whoever collected the data",
    ),
    "gdown": Terms(
        "Files shared on Google Drive",
        "`drive_links`: share links ('Anyone with the link') of a folder, archive, images or table",
        "those of whoever collected the data; a share link is no licence",
        "whoever collected the data",
    ),
    "kaggle_dataset": Terms(
        "A Kaggle data set",
        "`kaggle_dataset` as owner/name: attached to the session, or downloaded with your Kaggle key",
        "as stated on its page; re-uploads of IXI, OASIS and others stand under the original's terms",
        "the original data set, not only the upload",
    ),
    "ixi": Terms(
        "IXI: Information eXtraction from Images",
        "nothing: several GB are downloaded, and twice that is needed on the disk",
        "CC BY-SA 3.0 (Creative Commons Attribution-ShareAlike)",
        "IXI data set, https://brain-development.org/ixi-dataset/ (EPSRC grant GR/S21533/02)",
        "https://brain-development.org/ixi-dataset/",
        "three hospitals, each with its own scanner and ages: look at errors by site; OpenBHB contains IXI",
    ),
    "oasis1": Terms(
        "OASIS-1: cross-sectional, 18 to 96 years",
        "`data_dir` with the unpacked discs and the table oasis_cross-sectional, which you download yourself",
        _OASIS_TERMS,
        "Marcus et al. 2007, J Cogn Neurosci 19:1498-1507, doi:10.1162/jocn.2007.19.9.1498; acknowledge "
        "'OASIS: Cross-Sectional: Principal Investigators: D. Marcus, R. Buckner, J. Csernansky, J. Morris; "
        f"{_OASIS_GRANTS}'",
        _OASIS,
        "the T88_111 images are already registered and faces are removed",
    ),
    "oasis2": Terms(
        "OASIS-2: longitudinal, 60 to 96 years",
        "`data_dir` with OAS2_RAW_PART1 and 2 and the table of demographics, which you download yourself",
        _OASIS_TERMS,
        "Marcus et al. 2010, J Cogn Neurosci 22:2677-2684, doi:10.1162/jocn.2009.21407; acknowledge 'OASIS: "
        "Longitudinal: Principal Investigators: D. Marcus, R. Buckner, J. Csernansky, J. Morris; "
        f"{_OASIS_GRANTS}'",
        _OASIS,
        "nobody is younger than 60: a model trained on it alone knows no young brain",
    ),
    "openneuro": Terms(
        "An OpenNeuro data set",
        "`openneuro_id`, such as ds000001",
        "stated in its dataset_description.json, mostly CC0",
        "the data set by its DOI, and OpenNeuro: Markiewicz et al. 2021, eLife 10:e71774, "
        "doi:10.7554/eLife.71774",
        "https://openneuro.org",
    ),
    "openbhb": Terms(
        "OpenBHB: Open Big Healthy Brains, ten cohorts",
        "`data_dir` with its participants.tsv and the original scans (folders rawdata), which you download "
        "yourself",
        "CC BY-NC-SA 3.0, and the most restrictive agreement of the cohorts it is made of",
        "Dufumier et al. 2022, NeuroImage 263:119637, doi:10.1016/j.neuroimage.2022.119637, and its cohorts",
        "https://baobablab.github.io/bhb/",
        "it contains IXI, ABIDE, CoRR, GSP and others under new ids: never test on one of these a model "
        "trained on it",
    ),
    "adni": Terms(
        "ADNI: Alzheimer's Disease Neuroimaging Initiative",
        "`data_dir` with the images and `table`, the CSV that comes with them; access is granted on "
        "application",
        "ADNI Data Use Agreement: not to be passed on, manuscripts are sent to ADNI before they are "
        "submitted",
        "'Data used in preparation of this article were obtained from the Alzheimer's Disease Neuroimaging "
        "Initiative (ADNI) database (adni.loni.usc.edu)', with the full statement of its agreement",
        "https://adni.loni.usc.edu",
        "ages of the table are those at the visit; mostly over 55 years",
    ),
}
"""By the name of the source."""
