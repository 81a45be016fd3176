"""Write docs/metrics.md and grafana/kvrelay.json from the metric catalogue; `--check` only compares.

python scripts/metrics_documents.py
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "engine"))

from kvrelay.metrics.documents import grafana_dashboard, metrics_page  # noqa: E402


def main(arguments: list[str]) -> int:
    """0, or 1 when `--check` finds a difference."""
    documents = {
        ROOT / "docs" / "metrics.md": metrics_page(),
        ROOT / "grafana" / "kvrelay.json": json.dumps(grafana_dashboard(), indent=1) + "\n",
    }
    stale = [path for path, text in documents.items() if not path.exists() or path.read_text() != text]
    if "--check" in arguments:
        print(*(f"{path.relative_to(ROOT)} differs from the catalogue" for path in stale), sep="\n")
        return int(bool(stale))
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(documents[path])
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
