"""Verify: index, cache and corpus held against each other, and mended where that is free."""

from typing import Annotated, Any

from prefect import flow
from prefect.states import Completed
from pydantic import Field

from tasks.artifacts import publish_verified
from tasks.findings import headline
from tasks.params import load_config
from tasks.repair import repair as mend
from tasks.verify import verify as look

FOUND = "Found"
"""State of a run that leaves something to do."""


@flow(name="verify", flow_run_name="verify {config}", persist_result=False)
def verify(
    config: str,
    repair: bool = False,
    sample: Annotated[int, Field(ge=0)] = 0,
    settings: list[str] = [],  # noqa: B006
) -> Any:
    """Hold index, cache and corpus against each other.

    Args:
        config: Path of the YAML file that describes the corpus and its index.
        repair: Mend what can be mended at no cost, as one new generation of the index.
        sample: Texts to embed again, to see whether their vectors are right. 0: a few where that
            costs nothing, else none.
        settings: Config values as key=value, one an item, say index.max_deleted_fraction=1.

    Returns:
        What was seen, a `Verified`; also an artifact of the run.
    """
    loaded = load_config(config, settings)
    verified = (mend if repair else look)(loaded, sample or None)
    publish_verified(verified)
    if verified.clean:
        return verified
    return Completed(name=FOUND, message=headline(verified), data=verified)
