"""Pages for people: an Explainer in the browser, and how similar a classifier finds the patches of images."""
