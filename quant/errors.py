"""Errors of quantisation."""


class QuantError(ValueError):
    """Something cannot be quantised, or was not quantised by us; the message says what, which value and what to do."""
