"""The mistakes a user can make, one class a kind. Each message names the key, file or row and the remedy."""


class TorchtitanRDError(Exception):
    """Base of every error that the command line prints as one message, without a traceback."""


class ConfigError(TorchtitanRDError):
    """A setting is unknown, of the wrong type, out of range or at odds with another one or with this machine."""


class DataError(TorchtitanRDError):
    """A data set is missing, unreadable, or holds values that the model cannot take."""


class CheckpointError(TorchtitanRDError):
    """A checkpoint is missing, damaged, unsafe, or does not belong to this run."""


class ClusterError(TorchtitanRDError):
    """The machines do not work together: a collective gives a wrong result or none."""


class TrainingError(TorchtitanRDError):
    """Training itself must stop: a non-finite loss or gradient under `training.on_nonfinite = "stop"`, or a block that
    would be compiled again under `compile.fail_on_recompile`."""
