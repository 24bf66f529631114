"""One protocol a file: which maps it needs of a batch, and the rows it makes of them. Found by name through ``explainer.plugins``."""
