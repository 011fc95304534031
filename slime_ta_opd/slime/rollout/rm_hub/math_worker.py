"""The child of math_answers.py: `python -P math_worker.py CPU_SECONDS`. A line in: [answer, label] as JSON; a line out: 1 where equal in value, else 0.

An expression such as 10^{10^{10}} or (10!)! keeps sympy busy for ever, inside of C code that no exception reaches. So each check has
CPU_SECONDS of processor time, then the kernel ends this process; the parent counts the answer as wrong and starts another one.
"""

import json
import os
import resource
import signal
import sys

MEMORY_BYTES = 4 * 2**30  # beyond what the imports have taken: libraries reserve address space by the number of cores


def equal(answer: str, label: str) -> bool:
    from math_verify import parse, verify

    gold = parse(f"\\boxed{{{label}}}" if "\\boxed" not in label else label, parsing_timeout=None)
    found = parse(answer, parsing_timeout=None)
    return bool(gold) and bool(found) and bool(verify(gold, found, timeout_seconds=None))


def main(cpu_seconds: float) -> int:
    replies = os.fdopen(os.dup(1), "wb", 0)
    os.dup2(2, 1)  # whatever a library prints is no reply
    equal("1", "1")  # imports and first use are not an answer's time
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    try:
        with open("/proc/self/statm") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    except (OSError, ValueError):
        pass  # not Linux, or a lower limit is in force
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    replies.write(b"ready\n")
    for line in sys.stdin.buffer:
        answer, label = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        try:
            right = equal(answer, label)
        except MemoryError:
            return 1
        except Exception:  # whatever a malformed expression makes the parser raise: not a right answer
            right = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(b"1\n" if right else b"0\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1])))
