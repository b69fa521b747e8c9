"""From text to the terms that keyword search looks for.

Words are runs of letters and digits in lower case, accents kept; a language adds stop words and
Snowball's stemming. Letters of scripts that are written without spaces (Chinese, Japanese, Thai
and the like), and Korean, give overlapping pairs instead of words.
"""

from __future__ import annotations

import re
import threading
import unicodedata
from functools import cache

import Stemmer

#: Snowball's algorithm by ISO 639-1 code.
ALGORITHMS = {
    "ar": "arabic", "da": "danish", "de": "german", "el": "greek", "en": "english",
    "es": "spanish", "fi": "finnish", "fr": "french", "hi": "hindi", "hu": "hungarian",
    "id": "indonesian", "it": "italian", "lt": "lithuanian", "ne": "nepali", "nl": "dutch",
    "no": "norwegian", "pt": "portuguese", "ro": "romanian", "ru": "russian", "sv": "swedish",
    "ta": "tamil", "tr": "turkish",
}  # fmt: skip
#: Written by pairs; stemming does not apply.
PAIRED = ("zh", "ja", "ko", "th")
LANGUAGES = ("", *sorted((*ALGORITHMS, *PAIRED)))

#: Lucene's English list, the usual one, and short lists of the words that are most of a text.
_STOP = {
    "en": "a an and are as at be but by for if in into is it no not of on or such that the their "
    "then there these they this to was will with",
    "de": "aber als am an auch auf aus bei bin bis da das dass dem den der des die doch du ein eine "
    "einem einen einer es für hat ich ihr im in ist ja mit nach nicht noch nur oder sich sie sind "
    "so und uns von vor war was wenn wer wie wir wird zu zum zur",
    "es": "a al con de del el en es esta este la las lo los no o para pero por que se si sin son su "
    "sus un una y",
    "fr": "à au aux avec ce ces dans de des du elle en est et il ils je la le les leur mais ne nous "
    "ou par pas pour que qui sa se ses son sur un une vous",
    "it": "a al che con da dei del della di e è gli i il in la le lo ma nel non o per più se si sono "
    "su un una",
    "nl": "aan als bij dat de die dit een en er het in is met naar niet of om op te tot uit van voor "
    "was wat zijn",
    "pt": "a ao as com da das de do dos e é em mais mas na não no nos o os ou para pela pelo por que "
    "se um uma",
    "ru": "а без бы в во вы для до его её ее если и из или к как на не но о об от по при с со так то "
    "у что это я",
}  # fmt: skip

#: Marks that are part of their letter (vowel signs, accents): Python's \\w leaves them out.
_MARKS = "".join(chr(c) for c in range(0x300, 0x3100) if unicodedata.category(chr(c))[0] == "M")
_RUN = re.compile(f"(?:[^\\W_]|[{_MARKS}])+")
# Thai to Khmer's neighbours, kana, CJK, Hangul.
_PAIRED_LETTERS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uac00-\ud7af\uf900-\ufaff\U00020000-\U0002ffff"
)
_PIECE = re.compile(f"[{_PAIRED_LETTERS}]+|[^{_PAIRED_LETTERS}]+")
_HAS_PAIRED = re.compile(f"[{_PAIRED_LETTERS}]")


class Analyzer:
    """Terms of texts in one language. Thread-safe."""

    def __init__(self, language: str = "") -> None:
        self.language = language
        self._stop = frozenset(_STOP.get(language, "").split())
        self._local = threading.local()  # a Snowball stemmer serves one thread
        self._algorithm = ALGORITHMS.get(language)

    def terms(self, text: str) -> list[str]:
        """Terms in the text's order, repeated as they are."""
        text = unicodedata.normalize("NFKC", text).lower()
        words = _RUN.findall(text)
        if _HAS_PAIRED.search(text):
            words = [piece for word in words for piece in _pieces(word)]
        if self._stop:
            stop = self._stop
            words = [w for w in words if w not in stop]
        return self._stem(words) if self._algorithm else words

    def _stem(self, words: list[str]) -> list[str]:
        stemmer = getattr(self._local, "stemmer", None)
        if stemmer is None:
            stemmer = self._local.stemmer = Stemmer.Stemmer(self._algorithm)
        return stemmer.stemWords(words)


def _pieces(word: str) -> list[str]:
    out = []
    for piece in _PIECE.findall(word):
        if len(piece) > 1 and _HAS_PAIRED.match(piece):
            out.extend(piece[i : i + 2] for i in range(len(piece) - 1))
        else:
            out.append(piece)
    return out


@cache
def analyzer(language: str) -> Analyzer:
    """The analyser of a language."""
    return Analyzer(language)
