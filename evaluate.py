"""Evaluate explainers: python evaluate.py --config configs/evaluate/quickstart.yaml."""

import sys

from explainer.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]], own_process=True))
