"""How many tokens a text is: guessed from its characters, corrected by every bill.

A provider bills a batch as one number and never says what a single text was. So an
observation is a whole batch: how its characters divide into kinds, and how many tokens it
turned out to be. What a character of each kind costs follows from many such batches.
"""

import json
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tasks.errors import SettingsError
from tasks.lance import PRIMARY_KEY, make_table, open_table, quoted, writing

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Floats = npt.NDArray[np.float64]

_LETTERS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_INSIDE = bytes(range(0x80, 0xC0))  # in UTF-8 they begin no character
_LETTERS_AND_INSIDE = _LETTERS + _INSIDE
_KINDS: dict[str, tuple[bytes, float, float]] = {
    "letter": (_LETTERS, 0.24, 0.5),
    "digit": (b"0123456789", 0.7, 0.6),
    "space": (bytes([*range(0x21), 0x7F]), 0.2, 0.6),
    "sign": (b"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", 0.7, 0.6),
    "latin": (bytes([*range(0xC0, 0xCB), 0xCC]), 0.8, 0.6),  # with marks
    "alphabet": (bytes([0xCB, *range(0xCD, 0xE0)]), 0.5, 0.6),  # Greek, Cyrillic, Arabic, …
    "ideograph": (bytes([0xE0, 0xE1, *range(0xE3, 0xEE)]), 1.0, 0.6),  # also Kana, Hangul, Thai
    "other": (bytes([0xE2, *range(0xEE, 0x100)]), 2.0, 0.8),  # emoji, symbols, curly quotes
    "text": (b"", 0.5, 8.0),  # the text itself: rounding, marks of begin and end, a prompt
}
"""The first bytes of a kind's characters, its tokens a character, and how wrong that may be.

The second is a cautious guess: more tokens than most tokenizers make. The third is relative,
after all kinds were scaled alike by what was billed.
"""
_CODES = bytes(
    next((code for code, (first, _, _) in enumerate(_KINDS.values()) if byte in first), 0)
    for byte in range(0x100)
)
_BEGINS = bytes(byte not in _INSIDE for byte in range(0x100))
_ASCII, _ALL = 4, len(_KINDS) - 1  # kinds of characters
_PRIOR: Floats = np.array([tokens for _, tokens, _ in _KINDS.values()])
_SPREAD: Floats = np.array([spread for _, _, spread in _KINDS.values()])

_FIRST_MARGIN, _LEAST_MARGIN = 0.3, 0.02
_BLOCK = 250  # texts counted at once, so that they stay in the processor's cache
_SMALL = 100.0  # tokens of a batch that is trusted half: a single text strays widely
_NEWEST = 1000  # batches of a run that are learned from
_RUNS = 20  # newest runs that are learned from
_REMEMBERED = 50.0  # batches that those count for at most, so that a run can learn a change
_WITNESSES = 2.0  # batches that it takes to doubt the scale which those agreed on
_LEAST_NOISE = 0.01  # relative; no sum of characters is nearer to any tokenizer
_FLOOR = 0.1  # of what was expected of a kind: none is for free
_ROUNDS = 6  # of a fit, after which it no longer moves

TABLE = "calibrations"
CALIBRATIONS = pa.schema(
    [
        pa.field("key", pa.utf8(), nullable=False, metadata=PRIMARY_KEY),
        pa.field("run_id", pa.utf8(), nullable=False, metadata=PRIMARY_KEY),
        pa.field("observations", pa.int64(), nullable=False),
        pa.field("tokens_per_character", pa.utf8(), nullable=False),
        pa.field("sums", pa.utf8(), nullable=False),
        pa.field("updated_at", pa.utf8(), nullable=False),
    ]
)
"""What each run learned of a tokenizer; `key` is provider/model, which is whose tokenizer it is.

`tokens_per_character` (JSON) is for people; the next run reads `sums` (JSON).
"""


def _characters(text: str) -> list[int]:
    """Characters of `text` by kind, in the order of _KINDS; of ASCII text only its kinds."""
    data = text.encode("utf-8", "surrogatepass")
    # Letters are most of most texts: without them the rest is quickly searched.
    rest = data.translate(_CODES, _LETTERS_AND_INSIDE)
    if text.isascii():
        digits, spaces = rest.count(1), rest.count(2)
        return [len(text) - len(rest), digits, spaces, len(rest) - digits - spaces]
    return [len(text) - len(rest), *map(rest.count, range(1, _ALL))]


@dataclass(frozen=True)
class Estimate:
    """Tokens of a text as expected by now; a value that pickles.

    Attributes:
        weights: Tokens a character of each kind, then tokens a text.
        margin: Relative; how much to add to the sum of a batch when a cap must not be passed.
        observations: Batches it was learned from.
    """

    weights: tuple[float, ...] = tuple(_PRIOR.tolist())
    margin: float = _FIRST_MARGIN
    observations: int = 0

    def count(self, text: str) -> int:
        """Expected tokens of `text`, at least 1."""
        tokens = self.weights[-1]
        for characters, weight in zip(_characters(text), self.weights, strict=False):
            tokens += characters * weight
        return max(1, int(tokens + 0.5))

    @property
    def measure(self) -> str:
        """Sizes are characters by kind."""
        return f"characters-{blake2b(_CODES, digest_size=4).hexdigest()}"

    def counts(self, texts: Sequence[str]) -> npt.NDArray[np.int32]:
        """The count of each of `texts`, in their order."""
        raw = pa.array([text.encode("utf-8", "surrogatepass") for text in texts], pa.binary())
        return self.of_sizes(self.sizes(raw))

    def sizes(self, texts: pa.Array) -> npt.NDArray[np.int32]:
        """Characters of each of `texts`, utf8 or its bytes, by kind, in the order of _KINDS."""
        sizes = np.zeros((len(texts), _ALL), np.int32)
        for start in range(0, len(texts), _BLOCK):
            block = texts.slice(start, _BLOCK)
            _count_kinds(block, sizes[start : start + len(block)])
        return sizes

    def of_sizes(self, sizes: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """The count of each text of these `sizes`."""
        tokens = np.full(len(sizes), self.weights[-1])
        # Summed in the order of `count`, so that both say the same.
        for kind, weight in zip(sizes.T, self.weights, strict=False):
            tokens += kind * weight
        return np.maximum(1, (tokens + 0.5).astype(np.int32))


def _count_kinds(texts: pa.Array, sizes: npt.NDArray[np.int32]) -> None:
    """Enter the characters of each of `texts` by kind in `sizes`."""
    offsets = np.frombuffer(texts.buffers()[1], np.int32)[texts.offset :][: len(texts) + 1]
    data = memoryview(texts.buffers()[2] or b"")[offsets[0] : offsets[-1]].tobytes()
    codes = np.frombuffer(data.translate(_CODES, _INSIDE), np.uint8)
    if data.isascii():
        ends, kinds = offsets[1:] - offsets[0], _ASCII
    else:
        whole = np.frombuffer(data.translate(_BEGINS), np.uint8)
        ends, kinds = np.append(0, np.cumsum(whole, dtype=np.int64))[offsets[1:] - offsets[0]], _ALL
    full = np.flatnonzero(np.diff(ends, prepend=0))  # reduceat knows no empty part
    starts = np.append(0, ends[:-1])[full]
    for kind in range(kinds):
        sizes[full, kind] = np.add.reduceat(codes == kind, starts, dtype=np.int32)


class Calibration:
    """Learns what a model's tokenizer makes of characters; for many threads at once."""

    def __init__(self, provider: str, model: str) -> None:
        self.key = f"{provider}/{model}"
        self._known = np.zeros((len(_KINDS) + 1,) * 2)
        self._seen: deque[Floats] = deque(maxlen=_NEWEST)
        self._observations = 0
        self._fitted: tuple[Estimate, Floats] | None = None
        self._lock = threading.Lock()

    def learn(self, sizes: npt.NDArray[np.int32], billed_tokens: int) -> None:
        """Take in what texts of these `sizes` turned out to be; 0 tokens teach nothing."""
        if billed_tokens <= 0 or not len(sizes):
            return
        amounts = np.append(sizes.sum(axis=0, dtype=np.float64), len(sizes))
        guess = amounts * _PRIOR
        trust = billed_tokens / (billed_tokens + _SMALL)
        with self._lock:
            self._seen.append(np.append(np.append(guess, billed_tokens) / guess.sum(), trust))
            self._observations += 1
            self._fitted = None

    def too_large(self, sizes: npt.NDArray[np.int32], tokens: int) -> None:
        """Take in the exact count that a refusal names: as good as a bill."""
        self.learn(sizes, tokens)

    def estimate(self) -> Estimate:
        """What is expected by now."""
        with self._lock:
            return self._fit()[0]

    def know(self, sums: Floats, observations: int) -> None:
        """Take in what `learned` gave in an earlier run."""
        with self._lock:
            self._known = self._known + sums
            self._observations += observations
            self._fitted = None

    def learned(self) -> tuple[Floats, int]:
        """The sums over what this run has seen, as `_fit` takes them, and of how many batches."""
        with self._lock:
            rows, weights = self._rows()[:, :-1], self._fit()[1]
        return (rows * weights[:, None]).T @ rows, len(rows)

    def _rows(self) -> Floats:
        return np.array(self._seen).reshape(-1, len(_KINDS) + 2)

    def _fit(self) -> tuple[Estimate, Floats]:
        if self._fitted is None:
            factors, margin, weights = _fit(self._rows(), self._known)
            tokens = tuple((_PRIOR * factors).tolist())
            self._fitted = Estimate(tokens, margin, self._observations), weights
        return self._fitted


def _fit(rows: Floats, known: Floats) -> tuple[Floats, float, Floats]:
    """Fit factors on the prior.

    Args:
        rows: A batch each: the share of each kind in its tokens by the prior (they sum to 1),
            the ratio of the tokens billed to those, and how far it is trusted, 0 to 1.
        known: Of earlier runs, the sum over batches of the outer product of shares and ratio.

    Returns:
        The factors, the margin, and the weight of each row: near 0 for one that strays.
    """
    shares, ratios, weights = rows[:, :-2], rows[:, -2], rows[:, -1]
    trust, gram, moment = weights, known[:-1, :-1], known[:-1, -1]
    before, now = gram.sum(), trust.sum()
    factors, held, off = np.ones(len(_KINDS)), np.zeros_like(gram), 0.0
    if before:
        mean = moment.sum() / before
        kinds = _solved(gram, moment / mean, np.diag((_LEAST_NOISE / _SPREAD) ** 2))
        squares = known[-1, -1] / mean**2 - 2 * kinds @ moment / mean + kinds @ gram @ kinds
        off = max(0.0, squares / before) ** 0.5
        factors = mean * kinds
        held = gram * np.outer(kinds, kinds) * min(1.0, _REMEMBERED / before)
    if now:
        # First one scale for all kinds. A median, so that a batch that strays does not move it.
        base = shares @ factors
        votes = np.append(trust, _WITNESSES if before else 0.0)
        scale = _part(np.append(ratios / base, 1.0), votes, 0.5)
        # Then a factor for each kind, held to 1 as far as nothing speaks against it: batches
        # that are all alike say nothing of their parts.
        shares, ratios = shares * factors / base[:, None], ratios / base / scale
        noise = _LEAST_NOISE
        for _ in range(_ROUNDS):
            ridge, weighted = held + np.diag((noise / _SPREAD) ** 2), shares.T * weights
            kinds = _solved(weighted @ shares, weighted @ ratios, ridge)
            missed = np.abs(shares @ kinds - ratios)
            noise = max(_LEAST_NOISE, 1.5 * _part(missed, trust, 0.5))
            weights = trust * np.minimum(1.0, 2 * noise / np.maximum(missed, noise))
        factors = factors * scale * kinds
        # How far off it would be on each batch, had it not seen that one.
        leverage = np.sum(weighted * np.linalg.solve(weighted @ shares + ridge, shares.T), axis=0)
        missed = missed / np.maximum(0.05, 1 - leverage)
        part = now / (now + min(before, _REMEMBERED))
        off = part * _part(missed, trust, 0.75) + (1 - part) * off
    margin = max(_LEAST_MARGIN, 2 * off + _FIRST_MARGIN / (1 + before + now))
    return factors, float(margin), weights


def _solved(gram: Floats, moment: Floats, ridge: Floats) -> Floats:
    """The factors that fit best, drawn to 1 by `ridge`, none of them under _FLOOR."""
    gram, moment = gram + ridge, moment + ridge.sum(axis=1)
    factors, free = np.full(len(moment), _FLOOR), np.ones(len(moment), dtype=bool)
    while free.any():
        rest = moment[free] - gram[np.ix_(free, ~free)] @ factors[~free]
        factors[free] = np.linalg.solve(gram[np.ix_(free, free)], rest)
        free = free & (factors >= _FLOOR)
        if (factors >= _FLOOR).all():
            break
        factors = np.maximum(factors, _FLOOR)
    return factors


def _part(values: Floats, weights: Floats, part: float) -> float:
    """The value with `part` of the weight below it, the upper one of two."""
    order = np.argsort(values)
    below = np.cumsum(weights[order])
    return float(values[order][below > part * below[-1]][0])


def load(state_uri: str, provider: str, model: str) -> Calibration:
    """What the newest runs learned of `model`; nothing where there was none yet."""
    calibration = Calibration(provider, model)
    table = open_table(state_uri, TABLE)
    if table is None:
        return calibration
    rows = table.search().where(f"key = {quoted(calibration.key)}").to_arrow().to_pylist()
    rows.sort(key=lambda row: str(row["updated_at"]), reverse=True)
    # To pass over a damaged row is safe: an estimate only plans. What is paid is what is billed,
    # and a batch that was packed too full is refused, split and learned from.
    sound = [(sums, row["observations"]) for row in rows if (sums := _sums(row)) is not None]
    for sums, observations in sound[:_RUNS]:
        calibration.know(sums, observations)
    return calibration


def _sums(row: dict[str, Any]) -> Floats | None:
    """The sums of a row, or None where no observations add up to them."""
    try:
        stored = json.loads(row["sums"])
        sums = np.array(stored["sums"], np.float64)
        fits = stored["prior"] == _PRIOR.tolist() and sums.shape == (len(_KINDS) + 1,) * 2
    except (ValueError, TypeError, KeyError):
        return None
    if not fits or not np.isfinite(sums).all() or (sums < 0).any() or not sums[:-1, -1].any():
        return None
    sound = np.allclose(sums, sums.T) and np.linalg.eigvalsh(sums)[0] > -1e-6 * np.trace(sums)
    return sums if sound else None


def save(state_uri: str, run_id: str, calibration: Calibration) -> None:
    """Keep what this run has learned, and only that; said again, it replaces what was kept.

    Raises:
        EmbedOnceError: It could not be written.
    """
    sums, observations = calibration.learned()
    if not observations:
        return
    tokens = dict(zip(_KINDS, calibration.estimate().weights, strict=True))
    row = {
        "key": calibration.key,
        "run_id": run_id,
        "observations": observations,
        "tokens_per_character": json.dumps(tokens),
        "sums": json.dumps({"prior": _PRIOR.tolist(), "sums": sums.tolist()}),
        "updated_at": datetime.now(UTC).isoformat(timespec="microseconds"),
    }
    with writing(f"the calibrations in {state_uri}"):
        table = make_table(state_uri, TABLE, CALIBRATIONS)
        merge = table.merge_insert(["key", "run_id"]).when_matched_update_all()
        merge.when_not_matched_insert_all().execute(pa.Table.from_pylist([row], CALIBRATIONS))


@dataclass(frozen=True)
class TokenizerEstimate:
    """The same questions as an `Estimate`, answered by the model's own tokenizer.

    Attributes:
        path: A tokenizer.json, read once a process at the first count; nothing is fetched.
        margin: Relative; the provider's may be of another version.
    """

    path: str
    margin: float = _LEAST_MARGIN
    observations: int = 0

    @property
    def measure(self) -> str:
        """Sizes are tokens; raises as `counts`."""
        return f"tokens-{_tokenizer(self.path)[1]}"

    def count(self, text: str) -> int:
        """Tokens of `text`, at least 1; raises as `counts`."""
        return int(self.counts([text])[0])

    def counts(self, texts: Sequence[str]) -> npt.NDArray[np.int32]:
        """The count of each of `texts`, in their order.

        Raises:
            SettingsError: The file is missing or holds no tokenizer.
        """
        whole = [text.encode(errors="replace").decode() for text in texts]  # no lone surrogates
        found = _tokenizer(self.path)[0].encode_batch_fast(whole)
        return np.fromiter((max(1, len(one)) for one in found), np.int32, len(whole))

    def sizes(self, texts: pa.Array) -> npt.NDArray[np.int32]:
        """The count of each of `texts`; raises as `counts`."""
        return self.counts(texts.to_pylist())[:, None]

    def of_sizes(self, sizes: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """The counts themselves."""
        return sizes[:, 0]


@lru_cache(maxsize=4)
def _tokenizer(path: str) -> "tuple[Tokenizer, str]":
    """The tokenizer in the file at `path`, and what names its content."""
    from tokenizers import Tokenizer  # noqa: PLC0415 - only who names a file needs it

    way_out = "Name the model's tokenizer.json in embedding.tokenizer, or leave it out to estimate."
    try:
        told = Path(path).read_text(encoding="utf-8")
        tokenizer = Tokenizer.from_str(told)
    except OSError as error:
        raise SettingsError(f"The tokenizer {path!r} cannot be read: {error}. {way_out}") from error
    except Exception as error:  # of no text, or of the library, which has no errors of its own
        raise SettingsError(f"{path!r} holds no tokenizer: {error}. {way_out}") from error
    tokenizer.no_truncation()  # a text that is too long must be seen to be
    tokenizer.no_padding()
    return tokenizer, blake2b(told.encode(), digest_size=8).hexdigest()
