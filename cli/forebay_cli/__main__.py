"""`python -m forebay_cli` is `forebay`."""

from forebay_cli.main import app

app()
