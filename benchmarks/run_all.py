"""Run every benchmark in this folder, keep each one's closing JSON line under benchmarks/out/, and sum up."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def run(script: Path, quick: bool) -> dict:
    """Run one script, show what it prints, and return its last line's JSON."""
    command = [sys.executable, str(script), *(["--quick"] if quick else [])]
    print(f"\n=== {script.stem}", flush=True)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    try:
        result = json.loads(lines[-1])
    except (IndexError, json.JSONDecodeError):
        result = {
            "name": script.stem,
            "holds": False,
            "error": f"no closing JSON line (exit status {process.returncode})",
        }
    (FOLDER / "out").mkdir(exist_ok=True)
    (FOLDER / "out" / f"{script.stem}.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def main() -> int:
    """Run all or the named benchmarks; exit 1 if one does not hold its bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="benchmarks to run (default: all)")
    parser.add_argument("--quick", action="store_true", help="short forms")
    options = parser.parse_args()
    others = [path for path in sorted(FOLDER.glob("*.py")) if path != Path(__file__).resolve()]
    # The rest are parts that several benchmarks share.
    scripts = [path for path in others if "__main__" in path.read_text(encoding="utf-8")]
    chosen = [path for path in scripts if not options.names or path.stem in options.names]
    results = [run(path, options.quick) for path in chosen]
    print("\n=== summary")
    for result in results:
        if "skipped" in result:
            print(f"skipped {result['name']}: {result['skipped']}")
            continue
        verdict = "holds" if result.get("holds") else "MISSED"
        print(f"{verdict:<7} {result['name']}: {result.get('value')} (bar {result.get('bar')})")
    return 0 if all(result.get("holds") or "skipped" in result for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
