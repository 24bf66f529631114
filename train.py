"""Train a classifier or an Explainer: python train.py fit --config configs/explainer/shapes_quickstart.yaml."""

import sys

from explainer.cli import train

if __name__ == "__main__":
    sys.exit(train())
