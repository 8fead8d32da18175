"""Training of `pasd_tiny`, the embedded PASD of small width; `scripts/train_pasd_tiny.py` is the command."""
