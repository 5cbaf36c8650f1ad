"""The path of the data, a module a stage: what goes in, what comes out.

read          a folder or a table          -> CHUNKS, one batch of rows at a time
fingerprint   CHUNKS                       -> KEYED: fixed-width keys, no text
compare       KEYED, the index             -> CHANGES: what happens to which row
lookup        CHANGES, the cache           -> MISSES: the texts nobody paid for yet
pack          MISSES                       -> PACKED: which text goes in which batch
fill          the corpus again, PACKED     -> batches of texts, ROWS for the index
embed         a batch                      -> an answer, durable in the journal
publish       ROWS, the cache              -> one generation of the index
report        what was counted             -> run report, artifacts, ledger
"""

from tasks.quick import rest_client_when_asked

rest_client_when_asked()  # before any module of the path imports lancedb
