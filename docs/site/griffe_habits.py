"""Reads our habits: a section `Example`, as there is one; lines that go on without indent; fields with a comment."""

import re
from typing import Any

import griffe


class Habits(griffe.Extension):
    """Put them into the words that griffe knows."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Change or add one docstring."""
        if getattr(obj, "docstring", None) is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r"^Raises:\n(?:  .*\n?)+", _hanging, text, flags=re.MULTILINE)
        elif obj.is_attribute and obj.parent is not None and obj.parent.is_class and obj.lineno:
            text = _comment(obj)
            if text:
                obj.docstring = griffe.Docstring(text, parent=obj)


def _hanging(section: re.Match[str]) -> str:
    """Return a section `Raises` with the lines that go on indented, as griffe expects them."""
    first, *lines = section.group(0).split("\n")
    starts = re.compile(r"  ([A-Z]\w*(Error|Exception)\b|Exception\b|Never\b)[^:]*:")
    return "\n".join([first, *(line if not line or starts.match(line) else "  " + line for line in lines)])


def _comment(field: Any) -> str:
    """Return the comment behind a field, with the lines of comment that go on below it."""
    lines = field.parent.module.lines_collection[field.parent.module.filepath]
    first = re.search(r"\s# (.*)$", lines[field.lineno - 1])
    if first is None:
        return ""
    words = [first.group(1)]
    for line in lines[field.lineno :]:
        further = re.match(r"\s*# (.*)$", line)
        if further is None:
            break
        words.append(further.group(1))
    text = " ".join(words)
    return text if text.endswith(".") else f"{text}."
