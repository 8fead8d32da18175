"""The doors for data: weights (`tensors`) and pictures (`images`)."""
