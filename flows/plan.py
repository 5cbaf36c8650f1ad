"""Plan: what a reindex would do and cost. It needs no key and leaves no trace."""

from prefect import flow

from tasks.artifacts import publish_plan
from tasks.form import Overrides, configured
from tasks.plan import Plan, make_plan


@flow(name="plan", flow_run_name="plan {config}", persist_result=False)
def plan(config: str, overrides: Overrides = Overrides()) -> Plan:
    """Say what a reindex would do and cost, and spend nothing.

    Args:
        config: Path of the YAML file that describes the corpus and its index.
        overrides: What this run does otherwise than the file says.

    Returns:
        The plan; also an artifact of the run.
    """
    planned = make_plan(configured(config, overrides), overrides)
    publish_plan(planned)
    return planned
