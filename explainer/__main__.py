"""``python -m explainer``: the command ``explainer``, where its script is not on the path."""

from explainer.cli import main

raise SystemExit(main())
