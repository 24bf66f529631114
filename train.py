"""Train a classifier or an Explainer: python train.py fit --config configs/explainer/shapes_quickstart.yaml."""

import sys

from explainer.cli import main
from explainer.commands.train import COMMANDS

if __name__ == "__main__":
    sys.exit(main(commands=COMMANDS, prog="train.py"))
