"""Metrics: one a file, a function and its torchmetrics class."""
