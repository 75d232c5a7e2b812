"""dtron: pre-training of Llama-like models with every dimension of parallelism, on torch.distributed alone."""

__version__ = "0.1.0"
