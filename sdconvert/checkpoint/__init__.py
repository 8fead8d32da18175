"""The first stage: a checkpoint is read strictly, and what it is gets written down."""
