"""Arrow files as a corpus: mapped where they lie on a disk, and copied a batch at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from tasks.errors import CorpusError
from tasks.read.formats import Part, reading
from tasks.read.portions import ROWS, copied, halved

STREAM_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"


class ArrowPart(Part):
    """An Arrow IPC file or stream."""

    def schema(self) -> pa.Schema:
        """The columns that the file states first."""
        with reading(self.path), self._opened() as file:
            return self._open(file, None).schema

    def batches(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """All rows, on a disk mapped into memory, copied a batch at a time."""
        names = self.schema().names
        with reading(self.path), self._opened() as file:
            # Columns that are left out are not unpacked, but those that are read are copied then.
            some = [names.index(name) for name in schema.names]
            reader = self._open(file, some if len(some) < len(names) else None)
            size = file.size()
            for batch in self._as_long(size, reader):
                for start in range(0, batch.num_rows, ROWS):
                    self._require(size)
                    for part in halved(batch.slice(start, ROWS)):
                        yield self._copied(part, size)

    def _opened(self) -> pa.NativeFile:
        if isinstance(self.path, Path):
            return pa.memory_map(str(self.path))
        return pa.PythonFile(self.path.open("rb"), "r")

    def _open(
        self, file: pa.NativeFile, columns: list[int] | None
    ) -> pa.ipc.RecordBatchFileReader | pa.ipc.RecordBatchStreamReader:
        options = pa.ipc.IpcReadOptions(included_fields=columns)
        start = file.read(6)
        if not start:
            raise CorpusError(f"{self.path} is empty, and so no Arrow file. Make it again.")
        if start == b"ARROW1":
            return pa.ipc.open_file(file, options=options)
        if start.startswith(b"FEA1"):
            raise CorpusError(f"{self.path} is Feather version 1. Write it again as version 2.")
        file.seek(max(file.size() - len(STREAM_END), 0))
        if file.read() != STREAM_END:
            raise CorpusError(
                f"{self.path} is no Arrow file, and as an Arrow stream it has no end: it was "
                "written or copied in part. Make it again."
            )
        file.seek(0)
        return pa.ipc.open_stream(file, options=options)

    def _as_long(self, size: int, reader: Any) -> Iterator[pa.RecordBatch]:
        """What stands in the file, while it is still `size` bytes long.

        Whoever touches a mapped page that is no longer in the file is killed without a word.
        """
        number = 0
        stream = isinstance(reader, pa.ipc.RecordBatchStreamReader)
        while stream or number < reader.num_record_batches:
            self._require(size)
            batch = next(reader, None) if stream else reader.get_batch(number)
            if batch is None:
                return
            yield batch
            number += 1

    def _copied(self, batch: pa.RecordBatch, size: int) -> pa.RecordBatch:
        """`batch`, whose offsets were checked: nothing else checks those of a mapped file."""
        self._require(size)
        try:
            batch.validate(full=True)
        except pa.ArrowInvalid as error:
            if "UTF8" not in str(error):
                raise
        return copied(batch)

    def _require(self, size: int) -> None:
        # What is read of a bucket is one version of an object, whatever is put there meanwhile.
        if isinstance(self.path, Path) and self.path.stat().st_size < size:
            raise CorpusError(
                f"{self.path} became shorter while it was read. Let what writes it end, better "
                "write a new file and rename it to this one, then run again.",
                path=str(self.path),
            )
