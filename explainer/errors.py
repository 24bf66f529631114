"""The errors a user can meet. Each message names the argument or file, the rule, the value received and the remedy.

All derive from :class:`ExplainerError`, so that ``except ExplainerError`` (and the command line, which prints the message
without a traceback) catches what the project itself diagnosed and nothing else.
"""


class ExplainerError(Exception):
    """Base class of every error the project raises on purpose."""


class ConfigError(ExplainerError, ValueError):
    """A configuration key, option or argument breaks a rule."""


class UnknownNameError(ConfigError):
    """A plug-in (data set, loss, baseline, metric, network, format) of that name does not exist."""


class ShapeError(ConfigError):
    """A tensor's shape, dtype or value range breaks a contract."""


class DatasetNotFoundError(ExplainerError, FileNotFoundError):
    """A data set, split or list is not where the configuration says."""


class CorruptSampleError(ExplainerError):
    """An image, mask or annotation file cannot be used."""


class CheckpointError(ExplainerError):
    """A checkpoint or export folder is missing, damaged, unsafe or of another kind."""


class FingerprintMismatchError(CheckpointError):
    """A checkpoint, map cache or result belongs to another classifier, method or data set."""


class UnsupportedLayerError(ExplainerError, TypeError):
    """A method has no rule for a layer of the classifier."""


class NotDifferentiableError(ConfigError):
    """Gradients are needed of a classifier that has none, or wrong ones."""


class QueryBudgetError(ExplainerError):
    """A classifier that gives scores only was asked about more images than its budget allows."""


class NumericalError(ExplainerError, ArithmeticError):
    """A loss or a map became NaN or infinite."""


class ExportError(ExplainerError):
    """An export failed or drifted further from the network than its tolerance."""
