"""How long the sentences of a page are, and how many numbers they have.

    python -m experiments.report.prose README.md docs/results.md

Tables, code and links' targets are left out.
"""

import re
import sys
from pathlib import Path
from statistics import mean


def sentences(text: str) -> list[str]:
    """Return the sentences of a page's running text and lists."""
    text = re.sub(r"^[ \t]*```.*?^[ \t]*```", "", text, flags=re.M | re.S)
    text = re.sub(r"<!--.*?-->|!\[.*?\]\(.*?\)", "", text, flags=re.S)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    lines = [
        line for line in text.splitlines() if not re.match(r"\s*(\||#|\{|:|$)", line)
    ]
    joined = " ".join(re.sub(r"^\s*([-*]|\d+\.)\s+", ". ", line) for line in lines)
    found = re.split(r"(?<=[.!?:])\s+(?=[A-Z\"`\[*(])", joined)
    return [s for s in found if len(re.findall(r"\w+", s)) > 1]


def figures(text: str) -> dict[str, float]:
    """Return lines, bytes, mean words and numbers of a sentence, and its most words."""
    found = sentences(text)
    words = [len(re.findall(r"[\w'/@.-]+", sentence)) for sentence in found]
    numbers = [len(re.findall(r"(?<![\w.])\d[\d.,]*", s)) for s in found]
    return {
        "lines": len(text.splitlines()),
        "bytes": len(text.encode()),
        "sentences": len(found),
        "words a sentence": round(mean(words), 1),
        "most words": max(words),
        "numbers a sentence": round(mean(numbers), 2),
    }


def main() -> None:
    """Print a line for every page."""
    for name in sys.argv[1:]:
        said = figures(Path(name).read_text())
        print(
            f"{name}: " + ", ".join(f"{value:g} {key}" for key, value in said.items())
        )


if __name__ == "__main__":
    main()
