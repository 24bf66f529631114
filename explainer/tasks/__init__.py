"""LightningModules: training the Explanandum and training the Explainer."""
