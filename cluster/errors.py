"""The exception tree. Every leaf is also a standard type, holds one message, and pickles.

    RaystillError
    ├── UserError                      a mistake in the config, the arguments or the inputs: exit code 2
    │   ├── ConfigError(ValueError)         a key or value
    │   ├── CorpusError(ValueError)         source files: missing, empty, damaged, too small
    │   ├── ModelError(ValueError)          a model directory that cannot be used as asked
    │   ├── TokenizerMismatch(ValueError)   teacher and student do not share a vocabulary
    │   ├── StorageError(OSError)           a storage root that cannot be written or read
    │   ├── PlacementError(RuntimeError)    more replicas or workers than the cluster can ever hold
    │   ├── ClusterUnreachable(ConnectionError)  no Ray answers at the address
    │   ├── RunInProgress(RuntimeError)     another process works on the same run
    │   └── PortInUse(OSError)
    ├── TeacherUnavailable(ConnectionError) no replica answered within the deadline
    ├── TeacherFailed(RuntimeError)         a teacher answered with an error, or with something else than was asked
    ├── NonFiniteLoss(ArithmeticError)      training stopped; the message names the rows
    ├── CorruptArtifact(ValueError)         files that do not match their manifest
    ├── TrainingFailed(RuntimeError)        the worker group failed more often than allowed
    ├── EvaluationFailed(RuntimeError)      a model could not be measured
    ├── QuantizationFailed(RuntimeError)    an artefact that does not reload to the same function
    ├── RegistryFailed(RuntimeError)        MLflow's registry did not take a version
    └── PromotionRefused(RuntimeError)      the gate or the files said no, or another promotion won

A message says what was asked, what was found, and what to do.
"""


class RaystillError(Exception):
    """Base of all errors that raystill raises on purpose."""


class UserError(RaystillError):
    """The user can fix this by changing the config, the arguments or the inputs."""


class ConfigError(UserError, ValueError):
    pass


class CorpusError(UserError, ValueError):
    pass


class ModelError(UserError, ValueError):
    pass


class TokenizerMismatch(UserError, ValueError):
    pass


class StorageError(UserError, OSError):
    pass


class PlacementError(UserError, RuntimeError):
    pass


class ClusterUnreachable(UserError, ConnectionError):
    pass


class RunInProgress(UserError, RuntimeError):
    pass


class PortInUse(UserError, OSError):
    pass


class TeacherUnavailable(RaystillError, ConnectionError):
    pass


class TeacherFailed(RaystillError, RuntimeError):
    pass


class NonFiniteLoss(RaystillError, ArithmeticError):
    pass


class CorruptArtifact(RaystillError, ValueError):
    pass


class TrainingFailed(RaystillError, RuntimeError):
    pass


class EvaluationFailed(RaystillError, RuntimeError):
    pass


class QuantizationFailed(RaystillError, RuntimeError):
    pass


class RegistryFailed(RaystillError, RuntimeError):
    pass


class PromotionRefused(RaystillError, RuntimeError):
    pass
