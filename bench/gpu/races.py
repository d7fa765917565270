"""What compute-sanitizer's racecheck reports of Triton's own reductions, told apart from races.

From Triton 3.8 on, a reduction over several warps has all 32 lanes of a warp store the warp's part into the same word
of shared memory, by one instruction (triton-lang/triton#11614; reports of older versions: #4736, #7264). Racecheck
calls that a write after a write. Sums and maxima are exchanged in butterflies of commutative operations, so all lanes
hold the same bits, and it does not matter whose store is last. Known is therefore: two writes, both by one instruction
of one kernel, in Triton's `standard.py`, where `tl.sum` and `tl.max` are defined. Anything else is a race until it is
explained: a read, two instructions, another file, or none.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass

ALL_RIGHT = "sanitize: every result is right"
"""The last line of `bench/sanitize.py`."""

_ACCESS = re.compile(r"(?P<kind>Read|Write) access at (?P<instruction>\S+?\+0x[0-9a-f]+)(?: in (?P<where>[^\[\n]*))?")
_REPORT = re.compile(r"=+ (?:Error|Warning): .*(?:Race reported|hazard detected)")
_STANDARD = re.compile(r"(?:^|/)triton/language/standard\.py:\d+$")


@dataclass(frozen=True)
class Races:
    """The reports of a log, each the text of its lines."""

    true: list[str]
    known: list[str]

    @classmethod
    def of(cls, log: str) -> Races:
        races = cls([], [])
        for report in _reports(log):
            (races.known if is_known(report) else races.true).append(report)
        return races

    def are_known(self, summary: str) -> bool:
        """Whether there are reports, all of them known, and as many as `summary` counts."""
        counted = re.search(r"RACECHECK SUMMARY: (\d+) hazards? displayed", summary)
        return bool(self.known) and not self.true and counted is not None and int(counted[1]) == len(self.known)


def _reports(log: str) -> list[str]:
    reports: list[list[str]] = []
    is_open = False
    for line in log.splitlines():
        if _REPORT.match(line):
            reports.append([line])
            is_open = True
        elif is_open and re.match(r"=+ {3,}\S", line):
            reports[-1].append(line)
        else:
            is_open = False
    return ["\n".join(lines) for lines in reports]


def is_known(report: str) -> bool:
    """Whether a report is one of the false ones that the docstring of this module describes."""
    accesses = [match.groupdict() for match in _ACCESS.finditer(report)]
    return (
        len(accesses) >= 2
        and {access["kind"] for access in accesses} == {"Write"}
        and len({access["instruction"] for access in accesses}) == 1
        and all(_STANDARD.search((access["where"] or "").strip()) for access in accesses)
    )


def main() -> int:
    """Prints the races of a log on standard input; 1 where there are any."""
    races = Races.of(sys.stdin.read())
    print("\n".join(races.true))
    print(f"{len(races.true)} races; {len(races.known)} known reports of Triton's reductions")
    return bool(races.true)


if __name__ == "__main__":
    sys.exit(main())
