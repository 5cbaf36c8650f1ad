"""The key of an account: where it is, and what is said where it is not.

It is read when a call is made. It comes from the environment or from a Prefect Secret block
and goes into the call, and nowhere else.
"""

import functools
import os
import time
from dataclasses import dataclass
from typing import Any

from pydantic import SecretStr

from tasks.errors import ProviderBusy, ProviderDenied, SettingsError

_BLOCK_LIVES_S = 60
"""So long a key from a block is used without asking Prefect again."""


@dataclass(frozen=True)
class KeySource:
    """Where the key of an account is. A value: it holds the way to the key, not the key.

    Attributes:
        variable: Of the environment.
        block: Name of the Prefect Secret block that is read instead; None is the variable.
        vendor: Whose key it is.
        remedy: What else to say where the variable holds none: where a key is to be had.
    """

    variable: str
    block: str | None
    vendor: str
    remedy: str

    def __str__(self) -> str:
        return self.variable if self.block is None else f"block {self.block!r}"

    @property
    def missing(self) -> str:
        """That there is no key, and what to do about it."""
        if self.block is not None:
            return (
                f"The Secret block {self.block!r} is empty. Store your key of {self.vendor} in it."
            )
        found = "is empty" if self.variable in os.environ else "is not set"
        return f"{self.variable} {found}. {self.remedy}"

    def read(self) -> SecretStr | None:
        """The key; None where there is none.

        Raises:
            SettingsError: What is there is no key.
            ProviderBusy: The Prefect API does not hand out the block just now.
        """
        if self.block is None:
            key, source = SecretStr(os.environ.get(self.variable, "").strip()), self.variable
        else:
            key = _key_in_block(self.block, self.variable, int(time.monotonic() / _BLOCK_LIVES_S))
            source = f"The Secret block {self.block!r}"
        # A header takes no other characters, and the error about one would show the key.
        if any(not "!" <= letter <= "~" for letter in key.get_secret_value()):
            raise SettingsError(
                f"{source} holds white space or letters that no key has. Copy the key again, "
                "without quotes and line breaks."
            )
        return key if key.get_secret_value() else None

    def read_for_call(self) -> SecretStr | None:
        """The key, for a call that is about to be sent; None where there is none.

        Raises:
            ProviderDenied: What is there is no key.
            ProviderBusy: As in `read`.
        """
        try:
            return self.read()
        except SettingsError as error:
            denied = ProviderDenied(str(error))
        raise denied

    def require(self) -> None:
        """Fail early where there is no key; the key itself is not tried.

        Raises:
            SettingsError: There is no key to be had.
        """
        try:
            key = self.read()
        except ProviderBusy as error:
            unread = SettingsError(str(error))
        else:
            if key is not None:
                return
            unread = SettingsError(self.missing)
        raise unread


@functools.lru_cache(maxsize=8)
def _key_in_block(name: str, variable: str, _period: int) -> SecretStr:
    from prefect.blocks.system import Secret  # noqa: PLC0415 - most keys are in the environment

    failed: SettingsError | ProviderBusy
    try:
        block: Any = Secret.load(name, _sync=True)  # type: ignore[call-arg]
        value = block.get()
    except ValueError:
        failed = SettingsError(
            f"There is no Secret block {name!r} that can be read. Create it in Prefect "
            f"(Blocks, Secret), or leave the block's name out and set {variable}."
        )
    except Exception as error:  # noqa: BLE001 - Prefect's client promises no class of errors
        failed = ProviderBusy(
            f"The Prefect API did not hand out the Secret block {name!r} "
            f"({type(error).__name__}). See that PREFECT_API_URL is right and its server runs.",
            retry_after=None,
        )
    else:
        # The block reads its own value as JSON, so digits alone come as a number.
        return SecretStr(str(value).strip())
    raise failed
