"""Job notes: what the state knows of texts that wait in a provider's Batch lane.

    jobs/<space>/<job>/texts.arrow    before it is created: what it holds
    jobs/<space>/<job>/id             right after: what the provider calls it
    jobs/<space>/<job>/done           nothing more is to come of it: all is stored and counted
    lanes/<space>/refused.arrow       texts that the lane does not take
    lanes/<space>/behind-<index>      since when an index waits for texts
    lanes/<space>/full                when the account had too much under way

The first is durable before anything is sent, so a run that dies in between leaves a job that may
or may not be there; who comes next looks for it among all that the provider holds.
"""

import json
import math
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc

from tasks.cache import Cache
from tasks.errors import StorageFailed
from tasks.keys import digest
from tasks.params import Index
from tasks.progress import tell_waiting
from tasks.providers import Space
from tasks.schemas import HASH
from tasks.storage import Hold, Holder, Storage, storage_at

JOB_TEXTS = pa.schema(
    [
        pa.field("line", pa.int32(), nullable=False),
        pa.field("text_hash", HASH, nullable=False),
        pa.field("tokens", pa.int32(), nullable=False),
    ]
)
"""The texts of a job, in the order of its file; `line` counts from 1."""

REFUSED = pa.schema([pa.field("text_hash", HASH, nullable=False)])
ABOUT = b"embed_once.job"


@dataclass(frozen=True)
class Submission:
    """A job as the state knows it.

    Attributes:
        name: Ours.
        made_at: When it was written down; ISO 8601, UTC.
        index: Folder and table it was made for.
        usd_per_million_tokens: Its price.
        texts: JOB_TEXTS.
        id: The provider's; None where nobody has heard it.
        done: Whether nothing more is to come of it; only its files are still to go.
    """

    name: str
    made_at: str
    index: str
    usd_per_million_tokens: float
    texts: pa.Table = field(repr=False)
    id: str | None = None
    done: bool = False

    @property
    def tokens(self) -> int:
        """Estimated."""
        return pc.sum(self.texts.column("tokens")).as_py() or 0

    @property
    def age_s(self) -> float:
        """Seconds since it was written down."""
        return seconds_since(self.made_at)


class JobNotes:
    """The notes of all jobs of a space, in a state."""

    def __init__(self, state_uri: str, space: Space) -> None:
        self._state_uri = state_uri
        self._space = space
        self._folder = f"jobs/{space.id}"

    @property
    def _storage(self) -> Storage:
        return storage_at(self._state_uri)

    def held(self, run_id: str) -> AbstractContextManager[Hold]:
        """Keep other runs from settling and submitting; who comes second waits."""

        def told(holder: Holder | None) -> None:
            who = f": {holder}" if holder else ""
            tell_waiting(f"the Batch lane of {self._space} is held by another run{who}")

        return self._storage.held(f"lanes/{self._space.id}.lock", run_id, math.inf, told)

    def all(self) -> list[Submission]:
        """Every job that has notes, the oldest first.

        Raises:
            StorageFailed: What a job holds cannot be read.
        """
        found = [self._read(name) for name in self._storage.folders(self._folder)]
        return sorted((each for each in found if each is not None), key=lambda each: each.made_at)

    def waiting(self, index: str | None = None) -> pa.Array:
        """text_hash of every text that is in one of them, or in one of those for `index`."""
        columns = [
            each.texts.column("text_hash").combine_chunks()
            for each in self.all()
            if not each.done and index in {None, each.index}
        ]
        return pa.concat_arrays([pa.array([], HASH), *columns])

    def write(self, submission: Submission) -> None:
        """Write down what is about to be submitted; durable when this returns."""
        about = {
            "made_at": submission.made_at,
            "index": submission.index,
            "usd_per_million_tokens": submission.usd_per_million_tokens,
        }
        table = submission.texts.replace_schema_metadata({ABOUT: json.dumps(about)})
        self._storage.write(self._path(submission.name, "texts.arrow"), _as_file(table))

    def write_id(self, submission: Submission, job_id: str) -> Submission:
        """Write down what the provider calls it."""
        self._storage.write(self._path(submission.name, "id"), job_id.encode())
        return replace(submission, id=job_id)

    def write_done(self, submission: Submission) -> None:
        """Write down that nothing more is to come of it."""
        self._storage.write(self._path(submission.name, "done"), b"")

    def forget(self, submission: Submission) -> None:
        """It is settled."""
        # Its texts last: without them an id is nothing, and the other way round it is looked up.
        for file in ("id", "texts.arrow"):
            self._storage.delete([self._path(submission.name, file)])
        self._storage.delete_all(self._path(submission.name))

    def _read(self, name: str) -> Submission | None:
        data = self._storage.read(self._path(name, "texts.arrow"))
        if data is None:
            return None
        try:
            table = pa.ipc.open_file(data).read_all()
            about = json.loads(table.schema.metadata[ABOUT])
        except (pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
            raise StorageFailed(
                f"{self._path(name, 'texts.arrow')} in {self._state_uri}, which says what a job "
                f"of the Batch lane holds, cannot be read ({error}). Bring the file back. If it "
                f"is lost, remove its folder; the texts of the job are then paid for again."
            ) from error
        job_id = self._storage.read(self._path(name, "id"))
        return Submission(
            name=name,
            texts=table.replace_schema_metadata(None),
            id=None if job_id is None else job_id.to_pybytes().decode(),
            done=self._storage.read(self._path(name, "done")) is not None,
            **about,
        )

    def _path(self, name: str, file: str = "") -> str:
        return f"{self._folder}/{name}/{file}".rstrip("/")

    def refused(self) -> pa.Array:
        """text_hash of the texts that the lane does not take."""
        data, found = self._storage.read(self._about("refused.arrow")), list[pa.Array]()
        with suppress(pa.ArrowInvalid, KeyError):  # then it refuses them again, at no cost
            if data is not None:
                found = pa.ipc.open_file(data).read_all().column("text_hash").chunks
        return pa.concat_arrays([pa.array([], HASH), *found])

    def refuse(self, hashes: list[bytes], cache: Cache) -> None:
        """Have texts go the realtime lane from now on, until they have a vector."""
        known = pa.concat_arrays([self.refused(), pa.array(hashes, HASH)]).unique()
        table = pa.table([known.filter(pa.array(~cache.holds(known)))], schema=REFUSED)
        self._storage.write(self._about("refused.arrow"), _as_file(table))

    def behind_s(self, index: Index) -> float | None:
        """Seconds for which an index has waited for texts of this lane; None where it does not."""
        return self._seconds_since(self._behind(index))

    def falls_behind(self, index: Index) -> None:
        """An index waits for texts from now on, unless it did before."""
        if self.behind_s(index) is None:
            self._note_time(self._behind(index))

    def caught_up(self, index: Index) -> None:
        """An index waits for nothing."""
        self._storage.delete([self._behind(index)])

    def full_s(self) -> float | None:
        """Seconds since the account had too much under way; None where it never had."""
        return self._seconds_since(self._about("full"))

    def note_full(self) -> None:
        """The account has too much under way."""
        self._note_time(self._about("full"))

    def _behind(self, index: Index) -> str:
        return self._about(f"behind-{digest(index.place.encode()).hex()}")

    def _about(self, file: str) -> str:
        return f"lanes/{self._space.id}/{file}"

    def _note_time(self, file: str) -> None:
        self._storage.write(file, datetime.now(tz=UTC).isoformat().encode())

    def _seconds_since(self, file: str) -> float | None:
        noted = self._storage.read(file)
        with suppress(ValueError, TypeError):  # else it counts from now on
            return None if noted is None else seconds_since(noted.to_pybytes().decode())
        return None


def seconds_since(moment: str) -> float:
    """Seconds since a moment in ISO 8601."""
    return (datetime.now(tz=UTC) - datetime.fromisoformat(moment)).total_seconds()


def _as_file(table: pa.Table) -> pa.Buffer:
    written = pa.BufferOutputStream()
    with pa.ipc.new_file(written, table.schema) as writer:
        writer.write_table(table)
    return written.getvalue()
