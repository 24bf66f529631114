"""Evaluation: attributors x data x protocols -> rows."""
