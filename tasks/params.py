"""The config file: every choice a person makes, checked before anything starts.

A config is one YAML file. Relative paths in it are taken from the project folder: the
nearest parent of the file that holds `prefect.yaml`, else the file's own folder. The
working directory never matters.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from tasks.addresses import HttpAddress, LocalPath, StoragePath, folder_or_name
from tasks.errors import SettingsError
from tasks.explain import explain
from tasks.yaml_file import lay_over, read_yaml

PROJECT = "prefect.yaml"
"""The file that makes a folder a project."""


class Settings(BaseModel):
    """What all parts of a config share: no unknown key, no silent conversion, no change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Split(Settings):
    """How a document is cut into chunks."""

    max_tokens: int = Field(default=400, ge=16, le=32_000, description="Longest chunk.")
    overlap_tokens: int = Field(
        default_factory=lambda values: values.get("max_tokens", 400) // 10,
        ge=0,
        description="What a chunk repeats of the last; a tenth of max_tokens if not given.",
    )

    @model_validator(mode="after")
    def _overlap_is_smaller(self) -> "Split":
        if self.overlap_tokens > self.max_tokens // 2:
            raise ValueError(
                f"overlap_tokens ({self.overlap_tokens}) must be at most half of "
                f"max_tokens ({self.max_tokens})"
            )
        return self


class FilesSource(Settings):
    """A folder of text, Markdown and code."""

    kind: Literal["files"]
    path: StoragePath = Field(description="Folder or s3:// address, or a single file.")
    include: list[str] = Field(default=["**/*"], description="Patterns as in .gitignore.")
    exclude: list[str] = Field(default=[], description="Patterns as in .gitignore.")
    respect_gitignore: bool = Field(default=True, description="Skip what git ignores.")
    trust_mtime: bool = Field(
        default=True,
        description="Do not read a file again that was not touched since the index was published, "
        "by its size, times and inode. false: read every file.",
    )
    split: Split = Split()


class TableSource(Settings):
    """A table with one chunk a row: Parquet, CSV, JSON lines, Arrow, LanceDB, or a folder."""

    kind: Literal["table"]
    path: StoragePath = Field(
        description="File, LanceDB table, or a folder of files of one kind; or its s3:// address."
    )
    id: str = Field(default="id", description="Column that names a chunk: text or integer.")
    text: str = Field(default="text", description="Column that is embedded.")
    document: str | None = Field(default=None, description="Column that names the document.")
    metadata: list[str] | None = Field(
        default=None, description="Further columns to keep; null keeps all of them."
    )


Source = Annotated[FilesSource | TableSource, Field(discriminator="kind")]


class Embedding(Settings):
    """Who embeds, and how long the vectors are."""

    provider: Literal["lexical", "voyage", "openai", "sentence-transformers"]
    model: str | None = Field(
        default=None,
        min_length=1,
        description="Name in configs/models.yaml; of openai any; for sentence-transformers a "
        "folder, or a name on the Hugging Face hub.",
    )
    dimension: int | None = Field(default=None, ge=1, description="null: the model's default.")
    output_dtype: str = Field(default="float", description="float, or ubinary: a bit a number.")
    input_type: Literal["document", "query"] | None = Field(
        default="document", description="What the model is told a text is; null: nothing."
    )
    base_url: HttpAddress | None = Field(
        default=None, description="Where the API is; null: the vendor's own address."
    )
    api_key_block: str | None = Field(
        default=None,
        min_length=1,
        description="Prefect Secret block; null: VOYAGE_API_KEY or OPENAI_API_KEY.",
    )
    lane: Literal["realtime", "batch", "auto"] = Field(
        default="realtime",
        description="How a reindex has texts embedded: realtime, at once; batch, by Voyage's Batch "
        "API, within hours and a third cheaper; auto, by that where it is worth the wait.",
    )
    lane_deadline: float = Field(
        default=86_400.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds that an index may wait for the Batch lane; then what is missing goes "
        "the realtime lane. auto needs at least the lane's window, 43200.",
    )
    tokenizer: LocalPath | None = Field(
        default=None, description="The model's tokenizer.json; null: estimated, then learned."
    )
    prepend: tuple[str, ...] = Field(
        default=(),
        strict=False,
        description="Columns that stand in front of each text when it is embedded: document, for "
        "files title, for tables any that is kept. Another choice is another space.",
    )
    device: str | None = Field(
        default=None,
        pattern=r"^(cpu|mps|cuda(:\d+)?)$",
        description="Where a local model runs: cpu, cuda, cuda:1 or mps; null: the best there is.",
    )
    backend: Literal["torch", "onnx", "openvino"] = Field(
        default="torch", description="What runs a local model."
    )
    precision: Literal["float32", "float16", "bfloat16"] | None = Field(
        default=None,
        description="What a local model computes in; null: as it was saved, or float32 where "
        "backend is not torch.",
    )

    @field_validator("model")
    @classmethod
    def _folder_is_absolute(cls, model: str | None, info: ValidationInfo) -> str | None:
        if model is None or info.data.get("provider") != "sentence-transformers":
            return model
        return folder_or_name(model, info)

    @field_validator("prepend")
    @classmethod
    def _each_name_reads_as_one(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if not name.strip() or {",", ":"} & set(name) or len(name.splitlines()) > 1:
                raise ValueError(
                    f"{name!r} cannot stand in front of a text: a name may not be blank or hold a "
                    "comma, a colon or a line break; rename the column"
                )
        if len(set(names)) < len(names):
            raise ValueError(f"a column stands there twice: {', '.join(names)}")
        return names


class LimitSettings(Settings):
    """The most a run may ask of the provider; null is what the model allows at that tier."""

    tier: Literal["free", 1, 2, 3] = Field(default=1, description="Usage tier of the account.")
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    concurrency: int = Field(default=8, ge=1, le=256, description="Most calls in flight at once.")
    texts_per_request: int | None = Field(default=None, ge=1)
    tokens_per_request: int | None = Field(default=None, ge=1)
    shared: bool = Field(
        default=False,
        description="Share the account's limits with other runs through the Prefect server.",
    )
    max_wait: float = Field(
        default=600.0, gt=0, description="Seconds without any answer that end a run as an outage."
    )


class RunLimitSettings(LimitSettings):
    """What a run may ask of the provider, and of its machine."""

    memory_mb: int | None = Field(
        default=None,
        ge=640,
        description="Most memory that the run's process takes, in MiB; null is half of the "
        "machine's.",
    )


class Runner(Settings):
    """Where the calls of a run are made."""

    kind: Literal["threads", "dask"] = Field(
        default="threads", description="threads of the run's own process, or workers of Dask."
    )
    processes: int | None = Field(
        default=None, ge=1, le=256, description="Of dask: so many processes on this machine."
    )
    address: str | None = Field(
        default=None,
        pattern=r"^(tcp|tls|ws|wss|ucx)://[^/\s]+:\d{1,5}$",
        description="Of dask: the scheduler of a cluster, tcp://host:8786.",
    )

    @model_validator(mode="after")
    def _workers_are_named_once(self) -> "Runner":
        named = [name for name in ("processes", "address") if getattr(self, name) is not None]
        if self.kind == "threads" and named:
            raise ValueError(f"{named[0]} belongs to kind: dask")
        if self.kind == "dask" and len(named) != 1:
            raise ValueError(
                "dask needs either processes, so many on this machine, or address, the scheduler "
                "of a cluster"
            )
        return self


class BudgetSettings(Settings):
    """What a run may cost, at list price."""

    max_usd: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Stop before the call that would make a run cost more US dollars; what was "
        "paid for is kept, and the next run goes on; not for verify --sample. null: no limit.",
    )
    approve_above_usd: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="Have a person approve the plan of a run that would cost more US dollars. "
        "null: none is asked.",
    )
    approval_timeout: float = Field(
        default=86_400.0,
        gt=0,
        le=31_536_000,
        description="Seconds after which a run that nobody has approved ends.",
    )


class Index(Settings):
    """The LanceDB table that follows the corpus."""

    uri: StoragePath = Field(description="Folder or s3:// address of the LanceDB database.")
    table: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", description="Name of the table.")
    metric: Literal["cosine", "l2", "dot", "hamming"] | None = Field(
        default=None, description="null: cosine, or hamming for ubinary."
    )
    max_deleted_fraction: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Refuse a run that would delete more than this share of the index.",
    )
    max_wait: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds to wait for another run that holds the index; 0: refuse at once.",
    )
    keep_generations: int = Field(
        default=5,
        ge=1,
        description="Most generations that stay readable; fewer where they would take more than "
        "twice the bytes of the newest one and the cache.",
    )

    @property
    def place(self) -> str:
        """Folder and table, as reports and the ledger name the index."""
        return f"{self.uri}/{self.table}"


class State(Settings):
    """Where what was paid for is kept: cache, journal, ledger."""

    uri: StoragePath = Field(description="Folder or s3:// address; several indexes may share it.")


class Engine(Settings):
    """Who embeds, how fast, and where what was paid for is kept."""

    embedding: Embedding
    limits: LimitSettings = LimitSettings()
    budget: BudgetSettings = BudgetSettings()
    on_error: Literal["quarantine", "fail_fast", "collect"] = Field(
        default="quarantine",
        description="What becomes of a text that the provider refuses: quarantine keeps it from "
        "being sent again, collect only reports it, fail_fast ends the run.",
    )
    state: State


class Config(Engine):
    """One index and all that fills it."""

    name: str = Field(min_length=1, max_length=80, description="For people, in reports.")
    source: Source
    limits: RunLimitSettings = RunLimitSettings()
    index: Index
    runner: Runner = Runner()

    @model_validator(mode="after")
    def _metric_fits_the_vectors(self) -> Self:
        bits = self.embedding.output_dtype == "ubinary"
        if self.index.metric is not None and (self.index.metric == "hamming") != bits:
            raise ValueError(
                f"index.metric {self.index.metric!r} does not fit embedding.output_dtype "
                f"{self.embedding.output_dtype!r}: hamming belongs to ubinary, cosine, l2 and dot "
                "to float"
            )
        return self

    @property
    def metric(self) -> Literal["cosine", "l2", "dot", "hamming"]:
        """The index's metric, the default filled in."""
        default: Literal["cosine", "hamming"] = (
            "hamming" if self.embedding.output_dtype == "ubinary" else "cosine"
        )
        return self.index.metric or default


def load_config(path: str | Path, settings: Sequence[str] = ()) -> Config:
    """Read and check the config at `path`, with `settings` ("a.b=c") laid over it.

    Returns:
        The config, all its paths absolute.

    Raises:
        SettingsError: The file cannot be read, or a key or value in it is wrong.
    """
    file = Path(path).expanduser().resolve()
    values = read_yaml(file)
    for setting in settings:
        lay_over(values, setting)
    try:
        return Config.model_validate(values, context={"base": project_folder(file)})
    except ValidationError as error:
        raise SettingsError(explain(error, file, Config), file=str(file)) from None


def engine_of(config: Engine | Mapping[str, Any] | str | Path) -> Engine:
    """What a `BatchEmbedder` needs, from a config file or from values as they stand in one.

    Raises:
        SettingsError: As in `load_config`.
    """
    if isinstance(config, Engine):
        return config
    if isinstance(config, str | Path):
        return load_config(config)
    try:
        return Engine.model_validate(dict(config))
    except ValidationError as error:
        raise SettingsError(explain(error, "What was given", Engine)) from None


def project_folder(file: Path) -> Path:
    """The folder that relative paths in the config at `file` start from."""
    return nearest_project(file.parent) or file.parent


def nearest_project(folder: Path) -> Path | None:
    """`folder`, or the nearest one above it, that holds `prefect.yaml`; None: there is none."""
    return next((each for each in (folder, *folder.parents) if (each / PROJECT).is_file()), None)
