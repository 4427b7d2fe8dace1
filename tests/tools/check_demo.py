"""Check the folder that `gradiend demo` wrote: the targets, and that its parts can be used.

    python tests/tools/check_demo.py runs/demo
"""
import json
import re
import sys
from pathlib import Path


def problems(folder: Path) -> list[str]:
    "Everything that is not as it should be. The targets stand here again, so that the demo does not judge itself."
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    s = summary["scores"]
    targets = {
        "correlation >= 0.95": s["correlation"] >= 0.95,
        "class means of opposite sign": s["mean_3SG"] * s["mean_3PL"] < 0,
        "class means at least 0.5 from 0": min(abs(s["mean_3SG"]), abs(s["mean_3PL"])) >= 0.5,
        "neutral mean within 0.25 of 0": abs(s["neutral_mean"]) <= 0.25,
        "probability at least doubled": s["probability_after"] >= 2 * s["probability_before"] > 0,
        "LMS at least 99 % of the base": s["lms_after"] >= 0.99 * s["lms_before"] > 0,
    }
    found = [f"not reached: {name}" for name, reached in targets.items() if not reached]
    report = (folder / "report.html").read_text(encoding="utf-8")
    found += [f"report.html loads {url}" for url in re.findall(r"""(?:src|href)\s*=\s*["'](?!data:|#)([^"']+)""", report)]
    if report.count("data:image/") < 3:
        found.append("report.html holds fewer than three figures")
    model = AutoModelForMaskedLM.from_pretrained(folder / "model", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", local_files_only=True)
    if model(**tokenizer("A sentence.", return_tensors="pt")).logits.isnan().any():
        found.append("the rewritten model gives no numbers")
    return found


def main() -> int:
    folder = Path(sys.argv[1])
    found = problems(folder)
    print(f"{json.loads((folder / 'summary.json').read_text(encoding='utf-8'))['seconds']:.0f} seconds")  # told, not judged: machines differ
    print("\n".join(found) if found else "the demo reached all its targets")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
