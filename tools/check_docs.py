"""Docs checks: every relative link points at a file, and docs/cli.md is what `--help` says today."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")


def broken_links() -> list[str]:
    tracked = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    found: list[str] = []
    for name in tracked.stdout.split():
        page = ROOT / name
        for target in LINK.findall(page.read_text(encoding="utf-8")) if page.exists() else ():
            if "://" not in target and not target.startswith("mailto:") and not (page.parent / target).exists():
                found.append(f"{name}: link to {target}, which isn't there")
    return found


def stale_cli_reference() -> list[str]:
    generator = ROOT / "tools" / "generate_cli_docs.py"
    if not generator.exists():
        return []
    check = subprocess.run([sys.executable, str(generator), "--check"], cwd=ROOT, capture_output=True, text=True)
    return [] if check.returncode == 0 else [check.stdout.strip() or check.stderr.strip()]


def main() -> int:
    wrong = [*broken_links(), *stale_cli_reference()]
    for line in wrong:
        print(line, file=sys.stderr)
    print(f"docs: {len(wrong)} problems")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
