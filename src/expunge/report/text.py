"""Words and numbers of a report: foreign text made harmless and visible, numbers made even."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from difflib import SequenceMatcher
from typing import Any

from markupsafe import Markup, escape

#: Characters of a text that a sample shows.
SHOWN = 480
#: Tokens per side that are aligned; the aligner's time grows with their product.
_ALIGNED = 400

# Controls that would vanish, or would turn the order of the letters around them (U+202E and its kin).
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff"
    "\ud800-\udfff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
# A word, or one letter of a script that puts no spaces between words.
_WORD = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_]+", re.UNICODE
)
_DENSE = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")


def clean(value: Any) -> Any:
    """`value` with every invisible control character written out (text only; marked-up text is left as it is)."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    text = value.replace("\r\n", "\n").replace("\u2028", "\n").replace("\u2029", "\n")
    return _INVISIBLE.sub(_visible, text)


def _visible(match: re.Match[str]) -> str:
    code = ord(match.group())
    if 0xD800 <= code <= 0xDFFF:
        return "\ufffd"  # half of a pair: no encoding can hold it
    return f"⟨U+{code:04X}⟩"


def shorten(text: str, limit: int = SHOWN) -> tuple[str, str]:
    """(`text` cut at `limit` characters, a note that says how much was cut, or "")."""
    if len(text) <= limit:
        return text, ""
    return text[:limit].rstrip(), f"… {grouped(len(text) - limit)} more characters"


def words(text: str) -> list[tuple[int, int]]:
    """Spans of the words of `text`; where a script has no spaces, of its letters."""
    spans: list[tuple[int, int]] = []
    for match in _WORD.finditer(text):
        start = match.start()
        for letter in _DENSE.finditer(text, match.start(), match.end()):
            if letter.start() > start:
                spans.append((start, letter.start()))
            spans.append(letter.span())
            start = letter.end()
        if start < match.end():
            spans.append((start, match.end()))
    return spans


def coinciding(said: str, expected: str) -> list[tuple[int, int]]:
    """Spans of `said` whose words coincide, in order, with words of `expected`; neighbours are joined."""
    spans = words(said)[:_ALIGNED]
    ours = [said[a:b].casefold() for a, b in spans]
    theirs = [expected[a:b].casefold() for a, b in words(expected)[:_ALIGNED]]
    joined: list[tuple[int, int]] = []
    for block in SequenceMatcher(None, ours, theirs, autojunk=False).get_matching_blocks():
        if block.size:
            joined.append((spans[block.a][0], spans[block.a + block.size - 1][1]))
    return joined


def marked(said: str, expected: str, limit: int = SHOWN) -> Markup:
    """`said` as HTML, escaped and cut, with what coincides with `expected` inside <mark>."""
    shown, note = shorten(clean(said), limit)
    parts, at = [], 0
    for start, end in coinciding(shown, clean(expected)):
        parts += [escape(shown[at:start]), Markup("<mark>"), escape(shown[start:end]), Markup("</mark>")]
        at = end
    parts.append(escape(shown[at:]))
    return Markup("").join(parts) + (Markup(' <span class="cut">{}</span>').format(note) if note else Markup(""))


def marked_spans(text: str, spans: Iterable[tuple[int, int]], limit: int = SHOWN) -> Markup:
    """`text` as HTML, escaped and cut, with the given spans of it inside <mark>."""
    parts, at, end_of_shown = [], 0, min(len(text), limit)
    for start, end in sorted(spans):
        start, end = max(at, min(start, end_of_shown)), min(end, end_of_shown)
        if start < end:
            parts += [
                escape(clean(text[at:start])),
                Markup("<mark>"),
                escape(clean(text[start:end])),
                Markup("</mark>"),
            ]
            at = end
    parts.append(escape(clean(text[at:end_of_shown])))
    note = f"… {grouped(len(text) - limit)} more characters" if len(text) > limit else ""
    return Markup("").join(parts) + (Markup(' <span class="cut">{}</span>').format(note) if note else Markup(""))


def longest_run(said: str, expected: str) -> tuple[int, int] | None:
    """Span of `said` with the longest run of words that `expected` has too, or None; case and punctuation aside."""
    spans, others = words(said)[:_ALIGNED], words(expected)[:_ALIGNED]
    ours = [said[a:b].casefold() for a, b in spans]
    theirs = [expected[a:b].casefold() for a, b in others]
    block = SequenceMatcher(None, ours, theirs, autojunk=False).find_longest_match()
    return (spans[block.a][0], spans[block.a + block.size - 1][1]) if block.size else None


def plain(text: str, limit: int = SHOWN) -> Markup:
    """`text` as HTML, escaped and cut."""
    return marked(text, "", limit)


def number(value: float | None, like: float | None = None) -> str:
    """A value for reading: three decimals below 10, fewer above (or as many as `like` has); a dash for none."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value if like is None else like)
    if size < 10:
        text = f"{value:.3f}"
    elif size < 1000:
        text = f"{value:.1f}"
    else:
        text = grouped(round(value)) if size < 1e6 else f"{value:.2e}"
    return text.replace("-", "−")


def compact(value: float, digits: int = 4) -> str:
    """A setting or an axis tick without needless zeros: 0.2, 1e-5, 120."""
    text = re.sub(r"e([+-])0+", r"e\1", f"{value:.{digits}g}").replace("e+", "e")
    return text.replace("-", "−", 1) if text.startswith("-") else text


def interval(low: float | None, high: float | None) -> str:
    """`0.051–0.098`, or nothing."""
    if low is None or high is None:
        return ""
    between = " to " if low < 0 else "–"
    widest = max(abs(low), abs(high))
    return f"{number(low, widest)}{between}{number(high, widest)}"


def percent(value: float | None) -> str:
    """A share as per cent with one decimal."""
    return "–" if value is None else f"{100 * value:.1f}%"


def grouped(count: int) -> str:
    """An integer with narrow spaces between thousands."""
    return f"{count:,}".replace(",", "\u202f")


def duration(seconds: float | None) -> str:
    """`4 min 05 s`, `0.3 s`, or a dash."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def plural(count: int, word: str, several: str = "") -> str:
    """`1 row`, `30 rows`; `several` where an s does not do."""
    return f"{grouped(count)} {word}" if count == 1 else f"{grouped(count)} {several or word + 's'}"


def sentence(words: str) -> str:
    """Words with a capital at the start and a full stop at the end."""
    return f"{words[:1].upper()}{words[1:].rstrip('.')}." if words else ""


def listed(items: Iterable[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    names = list(items)
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""


def named(source: str) -> str:
    """A hub id or alias as it is; of a path the last part: where it stands is nobody's business."""
    last = source.rstrip("/\\").replace("\\", "/").rpartition("/")[2]
    hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) is not None
    return source if hub_id or not last else last


_NAMES = {
    "cpu": "CPU",
    "gpu": "GPU",
    "gb": "GB",
    "rouge": "ROUGE",
    "nll": "NLL",
    "f1": "F1",
    "kl": "KL",
    "auc": "AUC",
    "l": "L",
    "mia": "MIA",
    "npo": "NPO",
    "ks": "KS",
    "mmlu": "MMLU",
    "uds": "UDS",
    "krs": "KRS",
    "cka": "CKA",
    "nf4": "NF4",
}


def human(name: str) -> str:
    """A metric's, split's or term's name as words: `rouge_l_f1` is ROUGE-L F1, `retain_unseen` is Retain unseen."""
    parts = [_NAMES.get(part, part) for part in name.split("_") if part]
    if not parts:
        return name
    return " ".join([parts[0][:1].upper() + parts[0][1:], *parts[1:]]).replace("ROUGE L", "ROUGE-L")
