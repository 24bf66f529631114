"""Tables, figures and HTML of results."""
