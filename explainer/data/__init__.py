"""Data sets that all yield :class:`explainer.tensors.Batch`."""
