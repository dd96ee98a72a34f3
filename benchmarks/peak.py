"""Run a program and write its peak resident memory, in bytes: python benchmarks/peak.py FILE PROGRAM [ARGUMENT ...]

A process inherits the peak of the one that forked it. This one is small, so the number is the program's own;
bench_runs.py has imported torch, and its children would inherit a large peak.
"""

import os
import sys

if __name__ == "__main__":
    file, program = sys.argv[1], sys.argv[2:]
    child = os.posix_spawnp(program[0], program, os.environ)
    _, status, usage = os.wait4(child, 0)
    with open(file, "w") as opened:
        opened.write(str(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)))
    code = os.waitstatus_to_exitcode(status)
    sys.exit(code if code >= 0 else 128 - code)
