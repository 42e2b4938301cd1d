"""Who: scans matched to rows of the table, cohort rules, cleaning and splits."""
