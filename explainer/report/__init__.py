"""Tables, figures and HTML: the only place that imports matplotlib."""
