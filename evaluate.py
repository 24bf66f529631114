"""Evaluate explainers: python evaluate.py --config configs/evaluate/quickstart.yaml."""

import sys

from explainer.cli import evaluate_main

if __name__ == "__main__":
    sys.exit(evaluate_main())
