"""The doors of Anthropic's API."""
