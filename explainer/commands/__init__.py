"""One module a command of ``explainer``: its arguments, and the order of its steps."""
