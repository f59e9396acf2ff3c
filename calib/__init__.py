"""Calibration data and quantisation."""
