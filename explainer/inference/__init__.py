"""Using what was trained: open a model, explain photographs, refine masks, select which to give."""
