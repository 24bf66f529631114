"""A process in which only the standard library and the packages named can be imported: what a clean installation of them would be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_FENCE = """
import sys
allowed = set(sys.stdlib_module_names) | set({packages!r})
finders = list(sys.meta_path)
class Fence:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in allowed or name.startswith("_sysconfigdata"):
            return next((spec for finder in finders if (spec := finder.find_spec(name, path, target)) is not None), None)
        return None
for name in [n for n in sys.modules if n.partition(".")[0] not in allowed]:
    del sys.modules[name]
sys.meta_path[:] = [Fence()]
"""


def alone(packages: tuple[str, ...], code: str, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``code`` there (by default in the repository, so that ``explainer`` may be among the packages)."""
    command = [sys.executable, "-c", _FENCE.format(packages=packages) + code, *(str(a) for a in arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd or Path(__file__).parents[3], check=False)
