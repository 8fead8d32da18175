"""Networks that diffusers does not have, made from those that it has."""
