"""The Voyage AI embeddings API on 127.0.0.1: its checks, limits, prices and, on demand, its faults.

No call leaves the machine and no key is needed. Vectors follow from the texts alone, so a
lost, doubled or swapped one can be seen.
"""

from tasks.simulator.ledger import Ledger, Record
from tasks.simulator.rules import Rule, read_rules
from tasks.simulator.server import Simulator, serve
from tasks.simulator.settings import Latency, Settings, read_settings

__all__ = [
    "Latency",
    "Ledger",
    "Record",
    "Rule",
    "Settings",
    "Simulator",
    "read_rules",
    "read_settings",
    "serve",
]
