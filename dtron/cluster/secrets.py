"""Finds tokens, keys and passwords, which must not be written to scripts, records and code copies."""

import os
import re
from collections.abc import Iterator, Mapping

__all__ = ["find_secret", "is_secret_file", "mask"]

_FILES = re.compile(
    r"(^|/)(\.env.*|\.netrc|\.pypirc|\.npmrc|\.git-credentials|id_(rsa|dsa|ecdsa|ed25519).*|.*\.(pem|key|p12)"
    r"|[^/]*(credential|secret)s?[^/]*\.(json|toml|ya?ml|txt|ini|cfg)|(hf_?)?token(\.txt)?)$",
    re.IGNORECASE,
)
# Group 1 of each is the secret.
_PATTERNS: dict[str, re.Pattern[str]] = {
    "a Hugging Face token": re.compile(r"\b(hf_[A-Za-z0-9]{20,})"),
    "a GitHub token": re.compile(r"\b((?:gh[pousr]_|github_pat_)[A-Za-z0-9_]{20,})"),
    "a GitLab token": re.compile(r"\b(glpat-[A-Za-z0-9_-]{20,})"),
    "an AWS access key": re.compile(r"\b((?:AKIA|ASIA)[A-Z0-9]{16})\b"),
    "an API key": re.compile(r"\b(sk-[A-Za-z0-9_-]{20,}|xox[abprs]-[A-Za-z0-9-]{10,})"),
    "a private key": re.compile(r"(-----BEGIN [A-Z ]*PRIVATE KEY-----)"),
    "a URL with a password": re.compile(r"[a-z][a-z0-9+.-]*://[^\s/:@'\"]*:(?!\*+@)([^\s/@'\"]{3,})@"),
    "a URL with a token": re.compile(r"https?://([^\s/:@'\"]{16,})@"),
    "a variable with a secret": re.compile(
        r"\b[A-Z][A-Z0-9_]*(?:_KEY|TOKEN|SECRET|_PASS|PASSWORD|PASSWD)=[\"']?([^\s\"'$*]{8,})"
    ),
    "a key or password": re.compile(
        r"(?i)\b[A-Z0-9_]*(?:api_?key|secret|passw(?:or)?d|access_?key|auth_?token|access_?token)[\"']?\s*[=:]\s*"
        r"[\"']?([A-Za-z0-9/+_.-]*\d[A-Za-z0-9/+_.-]{11,})"
    ),
}
_NAMES = re.compile(r"TOKEN|SECRET|PASSW|_PASS$|KEY$|CREDENTIAL|PRIVATE", re.IGNORECASE)
_MIN_LENGTH = 8  # of a variable's value: a shorter one would match by chance


def is_secret_file(name: str) -> bool:
    """Whether a file of this name usually contains secrets."""
    return bool(_FILES.search(name))


def find_secret(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """The kind and line of the first secret in a text, without the secret itself; empty if there is none.

    environment: values of variables whose names look like secrets (HF_TOKEN) count as secrets.
    """
    for what, start, _ in _secrets(text, environment):
        return f"{what} in line {text.count(chr(10), 0, start) + 1}"
    return ""


def mask(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """The text with every secret replaced by ***."""
    for _, start, end in sorted(_secrets(text, environment), key=lambda found: -found[1]):
        text = text[:start] + "***" + text[end:]
    return text


def _secrets(text: str, environment: Mapping[str, str]) -> Iterator[tuple[str, int, int]]:
    """(what it is, start, end), none of them within another."""
    taken: list[tuple[int, int]] = []
    for name, value in environment.items():
        if _NAMES.search(name) and len(value) >= _MIN_LENGTH and not os.path.exists(value):
            pattern = re.compile(f"({re.escape(value)})")
            yield from _unclaimed_matches(pattern, f"the value of {name}", text, taken)
    for what, pattern in _PATTERNS.items():
        yield from _unclaimed_matches(pattern, what, text, taken)


def _unclaimed_matches(
    pattern: re.Pattern[str], what: str, text: str, taken: list[tuple[int, int]]
) -> Iterator[tuple[str, int, int]]:
    for match in pattern.finditer(text):
        start, end = match.span(1)
        if not any(start < other_end and other_start < end for other_start, other_end in taken):
            taken.append((start, end))
            yield what, start, end
