"""Pipelines made of units: named inputs in, named outputs out, around one sampling loop whose models are swappable."""
