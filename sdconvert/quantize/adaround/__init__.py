"""AdaRound on second moments: each weight rounded up or down so that its layer's output changes least."""
