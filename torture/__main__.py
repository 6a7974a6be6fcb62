"""Maltreats servers on 127.0.0.1 and tells which of the cases they came through: `make torture`.

    python -m torture --bundle DIR [--quick] [--only WORD] [--json FILE]

Takes at most 15 minutes, with --quick about one; ends with 1 if a case failed. Each case starts servers of its own and
ends them by their process ids; nothing is sent to another machine.
"""

import argparse
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from torture.crowd import crowd_case
from torture.failures import killed_case, model_fails_case, stopped_case
from torture.report import Outcome, all_passed, print_outcomes, write_outcomes
from torture.surroundings import certificate_case, clock_case, corrupt_bundle_case, full_disk_case
from torture.wire import wire_cases

Case = Callable[[Path, bool], Outcome | Sequence[Outcome]]

# Word for --only -> the case, given a bundle and whether to be quick.
CASES: dict[str, Case] = {
    "crowd": lambda bundle, quick: crowd_case(bundle, 5 if quick else 60),
    "model": lambda _, _quick: model_fails_case(),
    "kill": lambda bundle, quick: killed_case(bundle, 1 if quick else 5),
    "stop": lambda _, quick: stopped_case(1 if quick else 10),
    "wire": lambda bundle, quick: wire_cases(bundle, 0.5 if quick else 15),
    "disk": lambda _, quick: full_disk_case(1 if quick else 10),
    "clock": lambda _, quick: clock_case(1 if quick else 10),
    "certificate": lambda _, _quick: certificate_case(),
    "bundle": lambda bundle, _quick: corrupt_bundle_case(bundle),
}
# These wait for certificates to end and for networks to load: too long for --quick.
SLOW = ("certificate", "bundle")


def main() -> int:
    """Runs the cases and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m torture", description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True, help="folder of a bundle with a detector")
    parser.add_argument("--quick", action="store_true", help="shorter, and without the slow cases")
    parser.add_argument("--only", action="append", choices=list(CASES), help="this case; may be given again")
    parser.add_argument("--json", type=Path, help="file to write the outcomes to")
    given = parser.parse_args()
    # So that the servers end as well when this is stopped from outside.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    chosen = given.only or [word for word in CASES if not (given.quick and word in SLOW)]
    outcomes: list[Outcome] = []
    began = time.perf_counter()
    for word in chosen:
        print(f"{time.perf_counter() - began:6.1f} s  {word}", file=sys.stderr, flush=True)
        found = CASES[word](given.bundle, given.quick)
        outcomes += [found] if isinstance(found, Outcome) else found
    print_outcomes(f"torture, {time.perf_counter() - began:.0f} s", outcomes)
    if given.json:
        write_outcomes(given.json, outcomes)
    return 0 if all_passed(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
