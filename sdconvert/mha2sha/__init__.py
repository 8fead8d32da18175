"""mha2sha: multi-head attention becomes one small convolution graph per head; weights and encodings follow."""
