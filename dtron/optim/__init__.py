"""Optimizers that torch does not have, or not for sharded parameters."""
