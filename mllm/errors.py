"""Errors of the policy layer."""


class PolicyError(ValueError):
    """A policy cannot be made or used as asked; the message says what, which value and what to do."""
