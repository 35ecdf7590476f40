"""Fresh interpreters, for what one process cannot show twice."""

import subprocess
import sys


def run_python(code, *, path, cwd):
    """The finished process of a fresh interpreter that imports from ``path`` before anything else."""
    first = f"import sys; sys.path.insert(0, {str(path)!r})\n"
    return subprocess.run([sys.executable, "-c", first + code], cwd=cwd, capture_output=True, text=True, timeout=300)
