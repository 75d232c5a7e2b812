"""The training loop and its front door: `from dtron.train.trainer import Trainer`."""
