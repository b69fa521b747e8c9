"""Build hook: an install generates the contract's stubs, so that none are kept in git."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ContractBuildHook(BuildHookInterface):
    """Runs tools/gen_protos.py before files are collected."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """See BuildHookInterface."""
        subprocess.run(
            [sys.executable, str(Path(self.root) / "tools" / "gen_protos.py")], check=True
        )
