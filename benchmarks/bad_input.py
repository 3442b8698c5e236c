"""Bad input of every kind to every public function, configuration, checkpoint and command: how many cases were tried.

Runs `tests/test_bad_input.py` with more drawn cases than the test suite has time for. A case passes where the call
gives the right answer, or refuses with an error that names the argument.

    python benchmarks/bad_input.py --effort 25
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from common import RESULTS, write_result

TESTS = Path(__file__).parents[1] / "tests" / "test_bad_input.py"


def run(effort: int) -> dict:
    """Tests, cases and failures by the name of the test; a test that counts no cases is one."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "-p", "no:cacheprovider", "-o", "junit_family=xunit1", f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", *options, str(TESTS)]
        subprocess.run(command, env={**os.environ, "EFFORT": str(effort)}, cwd=TESTS.parents[1])
        tests = list(ElementTree.parse(report).iter("testcase"))
    cases: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    for test in tests:
        name = re.sub(r"\[.*", "", test.get("name", ""), flags=re.DOTALL)
        counts = [int(entry.get("value", 0)) for entry in test.iter("property") if entry.get("name") == "cases"]
        cases[name] += sum(counts) or 1
        failed[name] += any(test.find(kind) is not None for kind in ("failure", "error"))
    return {
        "effort": effort,
        "tests": len(tests),
        "failed_tests": failed.total(),
        "cases": cases.total(),
        "cases_by_test": {name: count for name, count in cases.most_common()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--effort", type=int, default=25, help="times the cases of the test suite")
    parser.add_argument("--output", default=RESULTS / "bad_input.json")
    args = parser.parse_args()
    result = run(args.effort)
    print({name: result[name] for name in ("tests", "failed_tests", "cases")})
    write_result(args.output, result)
    if result["failed_tests"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
