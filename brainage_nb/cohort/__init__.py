"""Who: tables of people, sources of scans, cleaning, splits and the known-answer cohort."""
