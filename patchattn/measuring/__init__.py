"""Running a model over documents to measure a calibration."""
