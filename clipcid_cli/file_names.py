"""Names of files made of names that people chose: readable everywhere, and different for different names."""

from __future__ import annotations

import hashlib
import re
import unicodedata

# Letters that are no plain letter with a mark, and those that are usually written as two.
_SPELLED = str.maketrans(
    {"ä": "ae", "ö": "oe", "ü": "ue", "Ä": "Ae", "Ö": "Oe", "Ü": "Ue", "ß": "ss", "æ": "ae", "Æ": "Ae", "œ": "oe"}
    | {"Œ": "Oe", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "đ": "d", "Đ": "D", "ð": "d", "Ð": "D", "þ": "th", "Þ": "Th"}
)
_OTHERS = re.compile(r"[^A-Za-z0-9._-]+")


def file_name(text: str, separators: str = "", empty: str = "unnamed") -> str:
    """Return a name of ``[A-Za-z0-9._-]``; where letters are changed or lost for it, a hash of the text ends it.

    Args:
        separators: Characters that become ``-`` without a hash: those between the parts of a name.
        empty: What stands for a text of which no letter is left.
    """
    plain = re.sub(f"[{re.escape(separators)}]+", "-", text) if separators else text
    spelled = unicodedata.normalize("NFKD", unicodedata.normalize("NFC", plain).translate(_SPELLED))
    marks_gone = "".join(letter for letter in spelled if not unicodedata.combining(letter))
    name = _OTHERS.sub("-", marks_gone).strip("-.") or empty
    if name == (plain.strip("-") if separators else plain):
        return name
    return f"{name}-{hashlib.blake2b(text.encode('utf-8', 'surrogatepass'), digest_size=4).hexdigest()}"
