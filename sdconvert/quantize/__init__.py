"""Quantization: one traced graph that carries AIMET's quantizers, their ranges, and the files that hold them."""
