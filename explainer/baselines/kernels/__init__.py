"""The machinery that the methods share: hooks, graphs, propagation rules, mask searches. No method has its name here."""
