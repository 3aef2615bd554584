"""The one exception tree. Every error that fewbit raises on purpose is a `FewbitError`.

A message says what is wrong, where, and what to do next. The command line prints it without a
traceback and exits with 2.
"""


class FewbitError(Exception):
    """Base of every error that fewbit raises on purpose."""


class ConfigError(FewbitError, ValueError):
    """A setting is out of range, unknown, or contradicts another."""


class CalibrationError(FewbitError, ValueError):
    """The calibration or evaluation data cannot be used."""


class ModelError(FewbitError):
    """The model to be quantized cannot be read or cannot be quantized."""


class StateError(ModelError, OSError):
    """The model is quantized already, or not yet, or a class is used that cannot be instantiated."""


class SolverError(FewbitError):
    """A layer could not be solved (only raised in strict mode, where fallbacks are errors)."""


class CheckpointError(FewbitError):
    """A quantized checkpoint is damaged, incomplete or of an unknown kind."""


class KernelError(FewbitError, ValueError):
    """The kernel asked for cannot run this layer here; the message says which condition fails."""


class OutputError(FewbitError, OSError):
    """The output folder cannot be used: it holds something else, is locked, or its disk is full."""


class ResumeError(OutputError):
    """An interrupted run lies in the output folder, but it was made from other inputs."""


class RankError(FewbitError):
    """Another process of the same run (torchrun) failed, is gone, or was started with something else."""


class DependencyError(FewbitError, ImportError):
    """An optional package is needed; the message has the pip command."""
