"""Refuses words of our own where the field has a term: see the glossary in CONTRIBUTING.md.

python tests/check_words.py
"""

from pathlib import Path
import re
import sys

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("README.md", "docs/*.md", "keras_hla/**/*.py", "benchmarks/**/*.py", "examples/*.py")
PLACES += ("guides/*.py",)
WORDS = {
    r"tokens? that counts?\b|counted tokens?": "unmasked tokens",
    r"documents in a row": "packed sequences",
    r"(operators?|layers?|kernels?) of (one's|your|its) own": "custom operators",
    r"numbers of (the|its|a) state": "elements of the state",
    r"host time|time of the host|the host's time": "CPU overhead",
    r"bits a byte": "bits per byte",
    r"portable path": "portable implementation",
    r"held to (the|its|float64|one another|each other)": "checked against, compared with",
    r"computes? (anew|again)|computed (anew|again)": "recompute",
    r"outside of what (it|they) may be": "not among the allowed values",
    r"what becomes of": "(say what it is)",
}


def found():
    """The places where the words are, also over the end of a line."""
    for pattern in PLACES:
        for path in sorted(ROOT.glob(pattern)):
            text = path.read_text(encoding="utf-8")
            joined = re.sub(r"\n[ #>]*", " ", text)  # of the same meaning, on one line
            for words, term in WORDS.items():
                for match in re.finditer(words.replace(" ", r"\s+"), joined, re.IGNORECASE):
                    line = joined[max(0, match.start() - 40) : match.end() + 20]
                    yield f"{path.relative_to(ROOT)}: ...{line}...: write: {term}"


def main():
    lines = [*found()]
    print("\n".join(lines) or f"none of {len(WORDS)} words is used")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
