"""What it means when the wire breaks under Voyage's SDK, which sends through requests."""

import re

from requests import exceptions as requested
from urllib3.exceptions import DecodeError, LocationParseError, NameResolutionError
from urllib3.exceptions import TimeoutError as TimedOut

from tasks.errors import ProviderDenied
from tasks.providers.broken import (
    DEADLINE,
    NO_ADDRESS,
    NO_HEADER,
    NO_NAME,
    UNPACKED,
    Meaning,
    Wire,
    broken_off,
)

_WIRE = Wire(
    first={
        requested.InvalidURL: NO_ADDRESS,
        requested.InvalidSchema: NO_ADDRESS,
        requested.MissingSchema: NO_ADDRESS,
        LocationParseError: NO_ADDRESS,
        requested.InvalidHeader: NO_HEADER,
    },
    last={
        NameResolutionError: NO_NAME,
        requested.Timeout: DEADLINE,
        TimedOut: DEADLINE,
        DecodeError: UNPACKED,
        requested.ContentDecodingError: UNPACKED,
    },
    tunnel=re.compile(r"Tunnel connection failed: (\d{3})"),
    certificates="REQUESTS_CA_BUNDLE",
)


def meaning(error: Exception) -> Meaning:
    """What happens next after `error`, which came from the transport."""
    if (found := _WIRE.meaning(error)) is not None:
        return found
    if type(error) is OSError:  # requests raises it itself, and for this alone
        return (
            ProviderDenied,
            "cannot be asked: trusted certificates are missing. See REQUESTS_CA_BUNDLE",
        )
    return broken_off(error)
