"""Plain text of the Wikipedia articles that ship inside the gensim package (CC BY-SA).

A plain clean-up of wiki markup: templates, tables, references and image links go, link texts stay,
paragraphs shorter than 60 characters go. Every seventh article is for testing, the others for calibration.
"""

from __future__ import annotations

import bz2
import html
import re
from collections.abc import Callable
from pathlib import Path

_TAGS = ("math", "gallery", "timeline", "source", "pre", "table", "imagemap", "score")
_DROPPED_SECTIONS = re.compile(
    r"(references|external links|see also|further reading|notes|bibliography|footnotes|sources|gallery|citations"
    r"|works|filmography|discography|publications)\b",
    re.IGNORECASE,
)
_FILE = re.compile(r"\s*(file|image|category)\s*:", re.IGNORECASE)


def articles(dump: Path) -> tuple[list[str], list[str]]:
    """Calibration and test articles of the bzip2 dump."""
    found = []
    pages = bz2.decompress(dump.read_bytes()).decode("utf-8")
    for page in re.findall(r"<page>(.*?)</page>", pages, re.DOTALL):
        title = html.unescape(re.search(r"<title>(.*?)</title>", page)[1])
        body = re.search(r"<text[^>]*>(.*?)</text>", page, re.DOTALL)
        raw = html.unescape(body[1]) if body else ""
        if not raw or ":" in title or re.match(r"\s*#redirect", raw, re.IGNORECASE):
            continue
        text = clean(raw)
        if len(text) > 1500:
            found.append(f" = {title} =\n{text}")
    return [a for i, a in enumerate(found) if i % 7 != 6], [a for i, a in enumerate(found) if i % 7 == 6]


def clean(text: str) -> str:
    """Running text of one article."""
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<ref[^>/]*/\s*>", "", text)
    text = re.sub(r"<ref[^>]*>.*?</ref\s*>", "", text, flags=re.DOTALL | re.IGNORECASE)
    for tag in _TAGS:
        text = re.sub(rf"<{tag}[^>]*>.*?</{tag}\s*>", "", text, flags=re.DOTALL | re.IGNORECASE)
    text = _replace_nested(text, "{|", "|}", lambda inner: "")
    for _ in range(2):
        text = _replace_nested(text, "{{", "}}", _template)
    text = _replace_nested(text, "[[", "]]", lambda inner: "" if _FILE.match(inner) else f"[[{inner}]]")
    for _ in range(3):
        text = re.sub(r"\[\[([^\[\]]*)\]\]", _link, text)
    text = re.sub(r"\[https?://\S+\s+([^\]]*)\]", r"\1", text)
    text = re.sub(r"\[https?://\S+\]", "", text)
    text = re.sub(r"'{2,5}", "", text)
    text = re.sub(r"<br\s*/?>", "\n", text)
    text = html.unescape(re.sub(r"</?[a-zA-Z][^>]*>", "", text))
    sections = (_section(part) for part in re.split(r"(?m)^(?==+[^=].*=+\s*$)", text))
    return _spaces("\n".join(part for part in sections if part))


def _section(text: str) -> str:
    first, _, rest = text.partition("\n")
    head = re.match(r"(=+)\s*(.*?)\s*=+\s*$", first)
    if head and _DROPPED_SECTIONS.match(head[2]):
        return ""
    paragraphs = [p for p in map(_paragraph, (rest if head else text).split("\n")) if p]
    if not paragraphs:
        return ""
    return (f" {head[1]} {head[2]} {head[1]}\n" if head else "") + "\n".join(paragraphs)


def _paragraph(line: str) -> str:
    line = line.strip()
    if not line or line[0] in "|!{}[]*#:;" or line.startswith("__"):
        return ""
    line = re.sub(r"\(\s*[;,]*\s*\)", "", line)
    line = re.sub(r"\(\s*[;,]\s*", "(", line)
    line = re.sub(r"\s+([,.;:)])", r"\1", line)
    line = re.sub(r"[ \t]{2,}", " ", line)
    return line if len(line) >= 60 and line.count(" ") >= 8 else ""


def _template(inner: str) -> str:
    """The few templates that carry running text."""
    parts = [part.strip() for part in inner.split("|")]
    name = parts[0].lower()
    if name in ("convert", "cvt") and len(parts) > 2:
        return f"{parts[1]} {parts[2]}"
    if name == "lang" and len(parts) > 2:
        return parts[2]
    if name in ("quote", "cquote", "blockquote") and len(parts) > 1:
        return parts[1].split("=", 1)[-1]
    if name in ("nowrap", "nobr", "sic", "as of") and len(parts) > 1:
        return parts[1]
    return " – " if name in ("ndash", "spaced ndash", "snd") else ""


def _link(match: re.Match[str]) -> str:
    kinds = r"\s*(file|image|category|[a-z]{2,3}(-[a-z]+)?|simple|wikt|commons)\s*:"
    return "" if re.match(kinds, match[1], re.IGNORECASE) else match[1].split("|")[-1]


def _replace_nested(text: str, opening: str, closing: str, replace: Callable[[str], str]) -> str:
    """Replace every outermost opening…closing by what `replace` makes of its inside."""
    out, depth, start, i, last = [], 0, 0, 0, 0
    while i < len(text):
        if text.startswith(opening, i):
            if depth == 0:
                out.append(text[last:i])
                start = i
            depth += 1
            i += len(opening)
        elif text.startswith(closing, i) and depth:
            depth -= 1
            i += len(closing)
            if depth == 0:
                out.append(replace(text[start + len(opening) : i - len(closing)]))
                last = i
        else:
            i += 1
    if depth:
        last = start + len(opening)
    return "".join([*out, text[last:]])


def _spaces(text: str) -> str:
    text = html.unescape(text).replace("\xa0", " ").replace("\u200b", "")
    text = re.sub(r"[ \t]+", " ", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()
