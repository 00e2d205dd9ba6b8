"""Other programs' formats, one file and one function each."""

from .ai00 import export_ai00
from .peft import export_peft
from .runner import export_runner

EXPORTS = {"runner": export_runner, "ai00": export_ai00, "peft": export_peft}

__all__ = ["EXPORTS", "export_ai00", "export_peft", "export_runner"]
