"""Calibration: the pipeline runs on photographs, and the inputs of its graphs are kept per step."""
