"""Loss functions (pure functions of tensors) and their :class:`~explainer.losses.base.LossTerm` adapters."""
