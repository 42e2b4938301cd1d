"""Where scans and ages come from: folders, downloads, public data sets, the demo."""
