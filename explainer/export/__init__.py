"""Export formats (one a file) and loading of what was exported."""
