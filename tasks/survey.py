"""Survey: all that is known before anything is sent, and the guards that look at it.

The first half of every run, the order of the stages up to pack. It writes to the staging
folder only.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from lancedb.table import Table

from tasks.budget import usd_text
from tasks.cache import Cache
from tasks.catalog import ModelFacts, facts_for
from tasks.compare import Compared, Held, compare, tally
from tasks.errors import SettingsError, StorageFailed
from tasks.fill import Filled, Filling, KnownSizes
from tasks.fingerprint import Keyed, fingerprint
from tasks.form import Overrides
from tasks.index import Identity, generations, identity_of, open_index, require_space
from tasks.job_notes import JobNotes
from tasks.journal import unfolded_hashes
from tasks.keys import KeySet, hash_column
from tasks.lanes import Lane, lane_of, require_lane
from tasks.lookup import NONE, LookedUp, lookup
from tasks.memory import MOST, Sizes, in_flight_mb, sizes_for, within
from tasks.notes import Refused
from tasks.pack import Packed, pack
from tasks.params import Config, FilesSource
from tasks.prepare import Preparation
from tasks.providers import Provider, Space
from tasks.providers.opening import open_embedder, open_provider
from tasks.quarantine import Quarantine
from tasks.read import Reader
from tasks.read.files import FilesReader
from tasks.read.tables import TableReader
from tasks.scan import scan, scan_unless_known
from tasks.schemas import CHANGES, DELETIONS, HASH, MISSES, TableRef, metadata_fields
from tasks.stamps import FirstPass, kept_stamps, made_by
from tasks.storage import is_local, storage_at
from tasks.workers import on_workers, require_dask


@dataclass(frozen=True)
class Survey:
    """All that is known before anything is sent."""

    config: Config
    facts: ModelFacts
    provider: Provider
    sizes: Sizes
    reader: Reader
    identity: Identity
    cache: Cache
    quarantine: Quarantine
    keyed: Keyed
    indexed: TableRef
    indexed_version: int
    same_columns: bool
    compared: Compared
    looked_up: LookedUp
    lane: Lane
    packed: Packed
    indexed_splitter: str
    compare_s: float
    lookup_s: float

    @property
    def waits(self) -> bool:
        """Whether the run cannot publish yet: texts are in the Batch lane, or are to go there."""
        return bool(self.looked_up.waiting) or self.lane.name == "batch"

    def filling(self, sizes: KnownSizes, folder: Path) -> Filling:
        """The second pass; `sizes` of texts and calls, and the staging `folder`."""
        return Filling(
            reader=self.reader,
            changes=self.compared.changes,
            deletions=self.compared.deletions,
            packed=self.packed.table,
            # Rows of a table have places, those of files do not.
            table_rows=self.keyed.table if self.config.source.kind == "table" else None,
            sizes=sizes,
            folder=folder,
        )

    def refused(self, newly: Sequence[Refused]) -> pa.Array:
        """text_hash of every text that is left out: quarantined before, or refused now."""
        hashes = hash_column([text.text_hash for text in newly])
        return pa.concat_arrays([self.looked_up.quarantined, hashes])


def survey(
    config: Config,
    overrides: Overrides,
    folder: Path,
    *,
    anew: bool = False,
    came: pa.Array = NONE,
) -> Survey:
    """Read, fingerprint, compare, look up and pack; nothing is sent or published.

    Args:
        config: Which corpus, which index.
        overrides: What this run does otherwise.
        folder: Staging folder for the tables between the stages.
        anew: Read every file and every row of the index, whatever is known of them, and
            whatever memory that takes.
        came: text_hash of texts that this run has taken from the Batch lane.

    Raises:
        SettingsError: The config does not fit the corpus, the model or the index.
        CorpusError: The corpus holds what no index can hold.
    """
    facts = facts_for(config.embedding)
    require_lane(config.embedding)
    provider = on_workers(config, open_provider(config))
    reader = open_reader(config, overrides)
    identity = Identity(provider.space, reader.splitter)
    table = open_index(config.index)
    if table is not None:
        require_space(table, config.index, identity.space)

    first_pass = None if anew else _first_pass(config, overrides, reader, provider, table)
    keyed = fingerprint(reader, provider.estimate, folder / "keyed.arrow", first_pass)
    compare_started = time.perf_counter()
    target = folder / "indexed.arrow"
    indexed = scan(table, target) if anew else scan_unless_known(config, table, target)
    sizes = MOST
    if not anew:
        flying = in_flight_mb(provider, keyed.chunks_read, keyed.text_bytes)
        sizes = sizes_for(config.limits.memory_mb, max(keyed.table.rows, indexed.rows), flying)
        provider = within(sizes, provider, keyed.chunks_read, keyed.text_bytes)
    notes = keyed.notes
    held = Held(tuple(notes.unread), overrides.narrow or None, tuple(notes.unread_ids))
    same_columns = table is None or _by_name(metadata_fields(table.schema)) == _by_name(
        reader.metadata
    )
    compared = compare(
        keyed.table, indexed, config.source.kind, held, folder, same_columns=same_columns
    )
    lookup_started = time.perf_counter()
    jobs = JobNotes(config.state.uri, identity.space)
    may_wait = config.embedding.lane != "realtime"
    # In the order in which answers go: one that moves on in between is seen twice. Of the
    # realtime lane only what this index waits for from an earlier choice is waited for.
    in_lane = jobs.waiting(None if may_wait else config.index.place) if facts.batch_lane else NONE
    unfolded = unfolded_hashes(config.state.uri, identity.space)
    cache = Cache(config.state.uri, identity.space)
    quarantine = Quarantine(config.state.uri, identity.space.id)
    skip = quarantine.hashes if not overrides.retry_quarantined else pa.array([], HASH)
    looked_up = lookup(
        compared.changes,
        indexed,
        cache,
        folder / "misses.arrow",
        unfolded=unfolded,
        quarantined=skip,
        waiting=in_lane,
        came=came,
    )
    misses = looked_up.misses.load(MISSES)
    lane = lane_of(config.embedding, 0, None)
    if may_wait and misses.num_rows:
        taken = misses.filter(pa.array(~KeySet(jobs.refused()).holds(misses.column("text_hash"))))
        tokens = pc.sum(taken.column("tokens")).as_py() or 0
        lane = lane_of(config.embedding, tokens, jobs.behind_s(config.index))
        if lane.name == "batch":
            target = folder / "taken.arrow"
            looked_up = replace(looked_up, misses=TableRef.write(target, MISSES, [taken]))
    limits = provider.limits.with_margin(provider.estimate.margin)
    packed = pack(looked_up.misses, limits, folder / "packed.arrow")
    return Survey(
        config=config,
        facts=facts,
        provider=provider,
        sizes=sizes,
        reader=reader,
        identity=identity,
        cache=cache,
        quarantine=quarantine,
        keyed=keyed,
        indexed=indexed,
        indexed_version=0 if table is None else table.version,
        same_columns=same_columns,
        compared=compared,
        looked_up=looked_up,
        lane=lane,
        packed=packed,
        indexed_splitter=identity_of(table).splitter if table is not None else reader.splitter,
        compare_s=lookup_started - compare_started,
        lookup_s=time.perf_counter() - lookup_started,
    )


def _first_pass(
    config: Config, overrides: Overrides, reader: Reader, provider: Provider, table: Table | None
) -> FirstPass | None:
    """What is known of the files of the corpus; None where all is to be read."""
    source = config.source
    if not (isinstance(source, FilesSource) and isinstance(reader, FilesReader)):
        return None
    if not source.trust_mtime or not is_local(source.path):
        return None
    known = generations(table) if table is not None else []
    prepend = config.embedding.prepend
    made = made_by(source, reader.splitter, prepend, provider.estimate.measure)
    kept = kept_stamps(config, known[-1] if known else None, made)
    return FirstPass(reader.stamp, made, kept, narrow=bool(overrides.narrow))


def _by_name(fields: list[pa.Field]) -> dict[str, pa.DataType]:
    return {field.name: field.type for field in fields}


def open_reader(config: Config, overrides: Overrides) -> Reader:
    """The corpus, by the config.

    Raises:
        SettingsError: There is no source, or it cannot be narrowed as asked, or has not what is
            to stand in front of texts.
    """
    source, preparation = config.source, Preparation(config.embedding.prepend)
    if not is_local(source.path):
        from tasks.read.bucket import require_there  # noqa: PLC0415 - only who uses it loads it

        require_there(source.path)
    elif not Path(source.path).exists():
        raise SettingsError(f"source.path: there is nothing at {source.path}.")
    own = [config.index.uri, config.state.uri]
    if isinstance(source, FilesSource):
        return FilesReader(source, own, overrides.narrow or None, preparation)
    if overrides.narrow:
        raise SettingsError("A narrower source path needs a source of files, not of tables.")
    # Other tables of the database may be a corpus, the index itself may not.
    own = [f"{config.index.uri}/{config.index.table}.lance", config.state.uri]
    return TableReader(source, own, preparation)


def require_runnable(config: Config, overrides: Overrides) -> Space:
    """Refuse at once what can be seen to be wrong before the index is touched.

    Returns:
        What the run's vectors belong to.

    Raises:
        SettingsError: Provider, source, index or state cannot be what the config says.
    """
    require_dask(config.runner)
    require_lane(config.embedding)
    provider = open_embedder(config)
    open_reader(config, overrides)
    for key, uri in (("index.uri", config.index.uri), ("state.uri", config.state.uri)):
        _require_place(key, uri)
    table = open_index(config.index)
    if table is not None:
        require_space(table, config.index, provider.space)
    return provider.space


def _require_place(key: str, uri: str) -> None:
    if not is_local(uri):
        try:
            storage_at(uri).names("runs")
        except StorageFailed as error:
            raise SettingsError(f"{key}: {error}") from None
        return
    existing = next(path for path in (Path(uri), *Path(uri).parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise SettingsError(f"{key}: {uri} cannot be written; name another folder.")


def require_safe(survey: Survey, overrides: Overrides) -> None:
    """Refuse what a person must decide first; nothing was touched.

    Raises:
        SettingsError: The corpus is empty, has shrunk too far, or is cut by another splitter.
    """
    config, compared = survey.config, survey.compared
    if not survey.keyed.table.rows and open_index(config.index) is None:
        seen = ", ".join(f"{count} {why}" for why, count in survey.keyed.notes.skipped.items())
        raise SettingsError(
            f"source.path: there is nothing to index in {config.source.path}"
            f"{f' (skipped: {seen})' if seen else ''}. Check the path, and which documents or "
            "columns the source takes."
        )
    counts = tally(compared.changes.load(CHANGES), compared.deletions.load(DELETIONS))
    most = config.index.max_deleted_fraction
    if counts["deleted"] > most * compared.indexed:
        renamed = ""
        if config.source.kind == "files" and "document" in config.embedding.prepend:
            renamed = " A renamed document counts as deleted here, since its path is embedded."
        raise SettingsError(
            f"This run would delete {counts['deleted']:,} of {compared.indexed:,} chunks from the "
            f"index {config.index.table!r}, more than index.max_deleted_fraction ({most:g}) "
            f"allows. Nothing was touched. See that {config.source.path} is complete; if the "
            "corpus really shrank, run with --set index.max_deleted_fraction=1."
            f"{renamed}",
            deleted=counts["deleted"],
        )
    theirs, ours = survey.indexed_splitter or "none", survey.identity.splitter or "none"
    if theirs != ours and not overrides.accept_splitter:
        raise SettingsError(
            f"The index {config.index.table!r} was cut by splitter {theirs}, this config cuts by "
            f"{ours}. Going on would embed "
            f"{survey.packed.texts:,} texts ({survey.packed.tokens:,} tokens, "
            f"{usd_text(survey.facts.usd(survey.packed.tokens))}). Run with --accept-splitter to "
            "do so, or go back to the former source or splitter."
        )


def require_few_leave(survey: Survey, filled: Filled) -> None:
    """Refuse to publish where too many rows would go because their new text is refused.

    Raises:
        SettingsError: More would go than `index.max_deleted_fraction` allows.
    """
    config, rows = survey.config, survey.compared.indexed
    leaving = filled.deletions.load(DELETIONS).column("change").to_pylist()
    gone = leaving.count("deleted") + leaving.count("refused")
    if leaving.count("refused") and gone > config.index.max_deleted_fraction * rows:
        raise SettingsError(
            f"{gone:,} of {rows:,} chunks would leave the index {config.index.table!r}, most of "
            "them because the provider refuses their new text. Nothing was published. See the "
            "table `quarantine` for what it says; if it was in error, run with "
            "--retry-quarantined, else with --set index.max_deleted_fraction=1.",
            deleted=gone,
        )
