"""A training launcher for language models on several GPUs."""

__version__ = "0.1.0"
