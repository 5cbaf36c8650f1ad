"""Maintain: the index stays fast, and takes no more disk than it needs."""

from typing import Annotated

from prefect import flow
from pydantic import Field

from tasks import memory
from tasks.artifacts import publish_maintained
from tasks.maintain import Maintained
from tasks.maintain import maintain as maintain_index
from tasks.params import load_config


@flow(name="maintain", flow_run_name="maintain {config}", persist_result=False)
def maintain(
    config: str,
    prune_cache: Annotated[int, Field(ge=0)] = 0,
    settings: list[str] = [],  # noqa: B006
) -> Maintained:
    """Compact the index, drop old generations, and build what makes searches fast.

    Args:
        config: Path of the YAML file that describes the corpus and its index.
        prune_cache: Forget vectors that no kept generation of any index sharing the state uses
            and that are older than so many days; they would have to be paid for again. 0: none.
        settings: Config values as key=value, one an item, say index.keep_generations=2.

    Returns:
        What was done; also an artifact of the run.
    """
    memory.spare()
    done = maintain_index(load_config(config, settings), prune_cache or None)
    publish_maintained(done)
    return done
