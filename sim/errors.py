"""Errors of the simulation layer: what the caller got wrong, and what the environment did wrong."""


class SimError(Exception):
    """Base of every error that `sim` raises on purpose."""


class ConfigurationError(SimError, ValueError):
    """Something asked for does not exist or cannot be used as asked; the message names the valid values."""


class EnvironmentFault(SimError, RuntimeError):
    """The environment crashed, hung or left the finite numbers: the episode is an error, never a failure."""


class ResultError(SimError, RuntimeError):
    """A result cannot be stored; what was stored before it is kept."""
