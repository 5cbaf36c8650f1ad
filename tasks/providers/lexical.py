"""Vectors from the words of a text: no key, no weights, no network.

Feature hashing: each word falls into one slot of the vector, with a sign; a word that stands
there n times weighs log(1 + n). Identifiers count as the words they are made of. It matches
words, not meaning, and a query is embedded like a document.

A vector depends on its text alone, to the last bit: all sums are of whole numbers, so that
neither their order nor the machine can change them.
"""

import functools
import hashlib
import itertools
import operator
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tasks.limits import Learned, Limits
from tasks.prepare import PLAIN, Preparation
from tasks.providers import Answer, Space, Vectors

RECIPE = "words-1"
"""Names how a text becomes a vector; a change of anything below needs another one."""

STOP_WORDS = frozenset(
    """
    a about above across after again against all almost along already also although always am
    among an and another any anyone anything are aren around as at be became because become been
    before being below between both but by can cannot could couldn did didn do does doesn doing
    don done down due during each either else enough etc even ever every few first for from
    further get had hadn has hasn have haven having he hence her here hers herself him himself
    his how however if in indeed instead into is isn it its itself just last least less let ll
    made many may maybe me might mine more most much must my myself namely neither never no nor
    not nothing now of off often on once one only onto or other others otherwise our ours
    ourselves out over own per perhaps please put rather re same see seem seems several she
    should shouldn since so some something still such than that the their theirs them themselves
    then there therefore these they this those though through thus to together too toward
    towards two under until up upon us ve very via was wasn we well were weren what whatever
    when whenever where whereas whether which while who whole whom whose why will with within
    without won would wouldn yet you your yours yourself yourselves
    """.split()  # noqa: SIM905 - a paragraph reads better than 270 quoted words
)
"""English words that say nothing about the subject of a text."""

_WEIGHT_ONE = 4096
"""Weights are whole multiples of 1/4096: exact in any order, and fine enough."""

_CACHED_WORDS = 1 << 17
_CACHED_LETTERS = 48
_ROWS_AT_ONCE = 256

_ASCII_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+")
_SYMBOLS = "\u2600-\u27bf\U0001f000-\U0001faff"  # emoji: each one is a word
_IDEOGRAPHS = "\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3\uf900-\ufaff\U00020000-\U000323af"
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3005, 0x30FF),  # Hiragana, Katakana
)
"""Scripts that do not set spaces between words, besides the ideographs and Hangul."""


@dataclass(frozen=True)
class Lexical:
    """The words of a text, hashed into a vector.

    Attributes:
        dimension: Length of each vector; longer ones mix up fewer words.
        limits: What may be asked of it; it runs in this process and needs none a minute.
        preparation: What stands in front of the texts of its space.
    """

    dimension: int
    limits: Limits
    preparation: Preparation = PLAIN

    @property
    def space(self) -> Space:
        """Where its vectors live: one space for each dimension and recipe."""
        recipe = self.preparation.recipe(RECIPE)
        return Space("lexical", "lexical", self.dimension, preparation=recipe)

    @property
    def least(self) -> Learned:
        """There is no account."""
        return Learned()

    @property
    def unit_vectors(self) -> bool:
        """Every vector has length 1."""
        return True

    @property
    def estimate(self) -> "Lexical":
        """Its own count."""
        return self

    @property
    def margin(self) -> float:
        """Its count is exact."""
        return 0.0

    def count(self, text: str) -> int:
        """A quarter of the UTF-8 bytes of `text`, at least 1: nothing is paid by it."""
        size = len(text) if text.isascii() else len(_utf8(text))
        return max(1, -(-size // 4))

    def counts(self, texts: Sequence[str]) -> npt.NDArray[np.int32]:
        """`count` of each of `texts`."""
        return np.fromiter(map(self.count, texts), np.int32, len(texts))

    @property
    def measure(self) -> str:
        """Sizes are bytes."""
        return "bytes"

    def sizes(self, texts: pa.Array) -> npt.NDArray[np.int32]:
        """UTF-8 bytes of each of `texts`."""
        lengths: npt.NDArray[np.int32] = pc.binary_length(texts).to_numpy(zero_copy_only=False)
        return lengths[:, None]

    def of_sizes(self, sizes: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """`count` of each text of so many bytes."""
        return np.maximum(1, -(-sizes[:, 0] // 4))

    def prepare(self) -> None:
        """Nothing to load."""

    def require(self) -> None:
        """Nothing can be missing."""

    def for_queries(self) -> "Lexical":
        """A query is embedded like a document."""
        return self

    def embed(self, texts: Sequence[str]) -> Answer:
        """Embed `texts`; row i belongs to text i."""
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        for start in range(0, len(texts), _ROWS_AT_ONCE):
            part = texts[start : start + _ROWS_AT_ONCE]
            vectors[start : start + len(part)] = _embedded(part, self.dimension)
        return Answer(vectors, range(len(texts)), sum(map(self.count, texts)))

    def give_up(self) -> None:
        """Nothing to wait for."""


def words(text: str) -> list[str]:
    """The words of `text` as they are written, short and common ones included, in no order.

    Identifiers come apart (`parseHTTPHeader` is parse, HTTP, Header). Scripts without spaces
    give each character and each pair of neighbours.
    """
    if text.isascii():
        return _ASCII_WORD.findall(text)
    # Most texts beyond ASCII have a few such characters only, and the ASCII pattern is faster.
    pieces = text.split()
    found: list[str] = _ASCII_WORD.findall(" ".join(filter(str.isascii, pieces)))
    rest = " ".join(piece for piece in pieces if not piece.isascii())
    rest = unicodedata.normalize("NFKC", rest)
    spaced, unspaced = _patterns()
    runs = unspaced.findall(rest)
    found += spaced.findall(unspaced.sub(" ", rest) if runs else rest)
    for run in runs:
        found += run
        found += map(operator.add, run, run[1:])
    return found


def _embedded(texts: Sequence[str], dimension: int) -> Vectors:
    codes: list[int] = []
    counts: list[int] = []
    lengths: list[int] = []
    for text in texts:
        bag = Counter(map(_codes.__getitem__, words(text)))
        bag.pop(_DROPPED, None)
        if not bag:
            bag = _last_resort(text)
        codes += bag
        counts += bag.values()
        lengths.append(len(bag))

    hashed = np.array(codes, dtype=np.int64)
    weights = np.rint(np.log1p(np.array(counts)) * _WEIGHT_ONE) * (1 - 2 * (hashed & 1))
    rows = np.repeat(np.arange(len(texts)), lengths)
    cells = rows * dimension + (hashed >> 1) % dimension
    sums = np.bincount(cells, weights, minlength=len(texts) * dimension)
    sums = sums.reshape(len(texts), dimension)
    squares = np.einsum("ij,ij->i", sums, sums)
    for row in np.flatnonzero(squares == 0).tolist():  # its words cancel each other out
        sums[row, (_code(f"\0{texts[row]}") >> 1) % dimension] = squares[row] = 1
    vectors: Vectors = (sums / np.sqrt(squares)[:, None]).astype(np.float32)
    return vectors


def _last_resort(text: str) -> Counter[int]:
    """The codes of a text without a word that counts: all it has, and the text as a whole."""
    bag: Counter[int] = Counter()
    for word, times in Counter(words(text) or "".join(text.split())).items():
        bag[_code(word.casefold())] += times
    bag[_code(f"\0{text}")] += 1
    return bag


def _code(word: str) -> int:
    """63 bits that stand for `word`: the lowest is the sign, the others choose the slot."""
    digest = hashlib.blake2b(_utf8(word), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _utf8(text: str) -> bytes:
    """`text` as bytes, lone surrogates too: readers of broken files pass them on."""
    return text.encode("utf-8", "surrogatepass")


_DROPPED = -1


class _Codes(dict[str, int]):
    """Word as it stands in a text -> its code; forgets everything when it is full."""

    def __missing__(self, word: str) -> int:
        folded = word.casefold()
        code = _DROPPED if _says_nothing(folded) else _code(folded)
        if len(word) <= _CACHED_LETTERS:
            if len(self) >= _CACHED_WORDS:
                self.clear()
            self[word] = code
        return code


_codes = _Codes()


def _says_nothing(word: str) -> bool:
    """Whether `word` is a stop word or one letter of an alphabet.

    A single digit, symbol, ideograph or syllable says something.
    """
    if len(word) != 1:
        return word in STOP_WORDS
    if "\u3400" <= word <= "\ud7a3" or word >= "\U00020000":
        return False
    return word.isalpha() or unicodedata.category(word).startswith("M")


@functools.cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """What finds words in any script, and what finds runs of scripts without spaces.

    Made on first use: the classes of letters are read from Python's own Unicode tables, in
    which a letter never changes once it has been assigned.
    """
    upper, lower, other, unspaced = [], [], [], []
    for point in itertools.chain(range(0x3400), range(0xA000, 0xAC00), range(0xFB00, 0x1F000)):
        character = chr(point)
        mark = unicodedata.category(character).startswith("M")
        if not mark and not character.isalpha():
            continue
        if any(first <= point <= last for first, last in _UNSPACED):
            unspaced.append(point)
        elif character.isupper():
            upper.append(point)
        else:
            if mark or character.islower():
                lower.append(point)
            if mark or not character.islower():
                other.append(point)
    high, low, plain, joined = map(_character_class, (upper, lower, other, unspaced))
    spaced = (
        rf"[{high}]+(?=[{high}][{low}])|[{high}]?[{low}]+|[{high}]+|\d+|[{plain}]+|[{_SYMBOLS}]"
    )
    return re.compile(spaced), re.compile(f"[{joined}{_IDEOGRAPHS}]+")


def _character_class(points: Sequence[int]) -> str:
    """Ascending code points as the inside of a character class."""
    runs: list[list[int]] = []
    for point in points:
        if runs and point == runs[-1][1] + 1:
            runs[-1][1] = point
        else:
            runs.append([point, point])
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in runs)
