"""BatchNorm folding, INT8 placement and calibration."""
