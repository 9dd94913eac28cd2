"""How much memory this process has had at most."""

import re
import resource
import sys
from pathlib import Path


def peak_resident() -> int:
    """Bytes.

    Linux says it of the program that runs: what `getrusage` says there includes the process that started this one, as
    it was then.
    """
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
