"""Networks: the Explanandum, classifiers, the Explainer and how its class masks are used."""
