"""Errors that several modules of this package know. It imports none of them."""


class TemplateRefused(ValueError):
    """The chat template does not take these messages; the message says why."""
