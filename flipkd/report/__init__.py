"""How good scores are: metrics against labels, calibration, thresholds, samples to label, one HTML report."""
