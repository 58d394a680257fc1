"""Errors of the ROS layer: each message says what, which value, which limit and what to do."""


class ConfigurationError(ValueError):
    """A parameter, file or graph is wrong: the node or command stops before anything moves."""


class MessageError(ValueError):
    """A received message cannot be used; it is dropped and counted, and the node goes on."""


class RecordingError(RuntimeError):
    """A recording cannot be written any further; what was written before it is kept."""
