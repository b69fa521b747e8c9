"""What every part of Forebay shares: the generated contract, errors, constraints, settings."""

__version__ = "0.1.0"
