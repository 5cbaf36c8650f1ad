"""A config is checked to the last key before anything starts, and says what to change."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.errors import SettingsError
from tasks.form import Overrides
from tasks.params import Config, FilesSource, TableSource, load_config

FILES: dict[str, Any] = {
    "name": "docs",
    "source": {"kind": "files", "path": "docs"},
    "embedding": {"provider": "lexical"},
    "index": {"uri": "data/index", "table": "docs"},
    "state": {"uri": "data/state"},
}
TABLE: dict[str, Any] = {**FILES, "source": {"kind": "table", "path": "t.parquet"}}

Load = Callable[..., Config]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Writes a config with some of its keys replaced, and loads it."""

    def write(*settings: str, config: dict[str, Any] = FILES, **changed: Any) -> Config:
        kept = {key: value for key, value in {**config, **changed}.items() if value is not ...}
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(kept), encoding="utf-8")
        return load_config(tmp_path / "c.yaml", settings)

    return write


def refusal(load: Load, *settings: str, **changed: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        load(*settings, **changed)
    return str(caught.value)


def test_a_whole_config_is_taken_as_it_stands(load: Load) -> None:
    config = load(limits={"tier": 2, "concurrency": 3})
    assert isinstance(config.source, FilesSource)
    assert (config.name, config.limits.tier, config.limits.concurrency) == ("docs", 2, 3)


@pytest.mark.parametrize(
    ("runner", "said"),
    [
        ({"kind": "dask"}, "runner: dask needs either processes"),
        ({"kind": "dask", "processes": 2, "address": "tcp://a:1"}, "runner: dask needs either"),
        ({"processes": 2}, "runner: processes belongs to kind: dask"),
        ({"kind": "dask", "address": "a:8786"}, "runner.address: "),
        ({"kind": "dask", "address": "tcp://a"}, "runner.address: "),
        ({"kind": "dask", "adress": "tcp://a:1"}, "Did you mean 'address'?"),
        ({"kind": "ray"}, "runner.kind: "),
    ],
)
def test_workers_are_named_in_one_way(load: Load, runner: dict[str, Any], said: str) -> None:
    assert said in refusal(load, runner=runner)
    for good in ({"kind": "dask", "processes": 2}, {"kind": "dask", "address": "tcp://a:8786"}):
        assert load(runner=good).runner.kind == "dask"
    assert load().runner.kind == "threads"


def test_the_kind_of_the_source_decides_its_keys(load: Load) -> None:
    config = load(config=TABLE, source={**TABLE["source"], "metadata": ["lang"]})
    assert isinstance(config.source, TableSource)
    assert config.source.metadata == ["lang"]
    assert "source.metadata: unknown key" in refusal(
        load, source={**FILES["source"], "metadata": ["lang"]}
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"nmae": "docs"}, "nmae: unknown key. Did you mean 'name'?"),
        (
            {"source": {"kind": "files", "path": "docs", "exclud": []}},
            "source.exclud: unknown key. Did you mean 'exclude'?",
        ),
        (
            {"source": {"kind": "files", "path": "docs", "split": {"max_token": 100}}},
            "source.split.max_token: unknown key. Did you mean 'max_tokens'?",
        ),
        (
            {"source": {"kind": "table", "path": "t.csv", "txt": "body"}},
            "source.txt: unknown key. Did you mean 'text'?",
        ),
        ({"limits": {"teir": 1}}, "limits.teir: unknown key. Did you mean 'tier'?"),
        ({"limits": {"memory": 900}}, "limits.memory: unknown key. Did you mean 'memory_mb'?"),
        ({"state": {"uri": "s", "zzz": 1}}, "state.zzz: unknown key. Known here: uri."),
        ({"index": {"uri": "i", "table": "t", "metrik": "l2"}}, "Did you mean 'metric'?"),
        ({"embedding": {"provider": "lexical", "dim": 64}}, "embedding.dim: unknown key."),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(
    load: Load, changed: dict[str, Any], said: str
) -> None:
    assert said in refusal(load, **changed)


@pytest.mark.parametrize("url", ["https://me:hunter2@x.y/v1", "https://x.y/v1?key=hunter2"])
def test_a_secret_in_an_address_is_refused_and_not_shown(load: Load, url: str) -> None:
    embedding = {"provider": "voyage", "model": "voyage-4", "base_url": url}
    said = refusal(load, embedding=embedding)
    assert "embedding.base_url: an address holds no user, password or key." in said
    assert "hunter2" not in said


@pytest.mark.parametrize(
    ("changed", "key", "found"),
    [
        ({"limits": {"concurrency": "400"}}, "limits.concurrency", "'400'"),
        ({"limits": {"concurrency": 1.0}}, "limits.concurrency", "1.0"),
        ({"limits": {"concurrency": True}}, "limits.concurrency", "True"),
        ({"limits": {"concurrency": 0}}, "limits.concurrency", "0"),
        ({"limits": {"tier": 4}}, "limits.tier", "4"),
        ({"name": 7}, "name", "7"),
        ({"name": ""}, "name", "''"),
        ({"embedding": {"provider": "cohere"}}, "embedding.provider", "'cohere'"),
        ({"embedding": {"provider": "lexical", "dimension": 0}}, "embedding.dimension", "0"),
        ({"index": {"uri": "i", "table": "a/b"}}, "index.table", "'a/b'"),
        ({"index": {"uri": "i", "table": ""}}, "index.table", "''"),
        ({"index": {"uri": "i", "table": "../t"}}, "index.table", "'../t'"),
        ({"index": {"uri": 3, "table": "t"}}, "index.uri", "3"),
        ({"index": {"uri": "", "table": "t"}}, "index.uri", "''"),
        (
            {"index": {"uri": "i", "table": "t", "max_deleted_fraction": 1.5}},
            "index.max_deleted_fraction",
            "1.5",
        ),
        (
            {"source": {"kind": "files", "path": "d", "respect_gitignore": "no"}},
            "source.respect_gitignore",
            "'no'",
        ),
        (
            {"source": {"kind": "files", "path": "d", "split": {"max_tokens": "400"}}},
            "source.split.max_tokens",
            "'400'",
        ),
        ({"source": {"kind": "table", "path": "t.csv", "id": 1}}, "source.id", "1"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_its_key(
    load: Load, tmp_path: Path, changed: dict[str, Any], key: str, found: str
) -> None:
    said = refusal(load, **changed)
    assert f"{tmp_path / 'c.yaml'} is not a valid config:" in said
    assert f"  {key}: " in said
    assert f"(found {found})" in said


@pytest.mark.parametrize("key", ["name", "source", "embedding", "index", "state"])
def test_a_missing_key_is_named(load: Load, key: str) -> None:
    assert f"  {key}: missing." in refusal(load, **{key: ...})


def test_a_missing_key_of_a_part_is_named(load: Load) -> None:
    said = refusal(load, source={"kind": "table"}, index={"uri": "i"})
    assert "  source.path: missing." in said
    assert "  index.table: missing." in said


def test_a_source_without_a_known_kind_is_refused(load: Load) -> None:
    assert "  source: " in refusal(load, source={"path": "docs"})
    assert "'fils'" in refusal(load, source={"kind": "fils", "path": "docs"})


def test_all_that_is_wrong_is_said_at_once(load: Load) -> None:
    said = refusal(load, nmae="x", limits={"tier": 9}, state={"uri": "ftp://bucket/state"})
    assert [line.split(":")[0].strip() for line in said.splitlines()[1:]] == [
        "limits.tier",
        "state.uri",
        "nmae",
    ]


def test_an_overlap_must_be_at_most_half_of_the_chunk(load: Load) -> None:
    split = {"max_tokens": 100, "overlap_tokens": 51}
    said = refusal(load, source={**FILES["source"], "split": split})
    assert "overlap_tokens (51) must be at most half of max_tokens (100)" in said
    load(source={**FILES["source"], "split": {"max_tokens": 100, "overlap_tokens": 50}})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"name: [docs", "is not valid YAML"),
        (b"name: docs\nname: other", "the key 'name' stands twice"),
        (b"name: caf\xe9", "is not UTF-8"),
        (b"- name\n- docs\n", "must hold keys and values"),
        (b"", "must hold keys and values"),
        (b"docs", "must hold keys and values"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    with pytest.raises(SettingsError, match=said) as caught:
        load_config(file)
    assert str(file) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="There is no config file at") as caught:
        load_config(tmp_path / "none.yaml")
    assert str(tmp_path / "none.yaml") in str(caught.value)


def test_a_folder_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("setting", "read"),
    [
        ("name=other", lambda config: config.name == "other"),
        ("name=no", lambda config: config.name == "no"),
        ("limits.concurrency=2", lambda config: config.limits.concurrency == 2),
        ("limits.tier = 3", lambda config: config.limits.tier == 3),
        ("source.split.max_tokens=99", lambda config: config.source.split.max_tokens == 99),
        ("index.max_deleted_fraction=1", lambda config: config.index.max_deleted_fraction == 1),
        ("source.include=['*.md', a=b]", lambda config: config.source.include == ["*.md", "a=b"]),
        ("embedding.dimension=null", lambda config: config.embedding.dimension is None),
    ],
)
def test_a_setting_lies_over_the_file(
    load: Load, setting: str, read: Callable[[Config], bool]
) -> None:
    assert read(load(setting, embedding={"provider": "lexical", "dimension": 64}))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("name", "is no setting; write it as `key=value`"),
        ("=docs", "is no setting"),
        ("limits.=1", "is no setting"),
        ("name.inner=1", "'name' has no keys of its own"),
        ("name=[", "is not valid YAML"),
        ("limits.concurency=2", "Did you mean 'concurrency'?"),
        ("limits.concurrency=two", "limits.concurrency: "),
        ("limits.concurrency='2'", "(found '2')"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(load: Load, setting: str, said: str) -> None:
    assert said in refusal(load, setting)


def test_a_later_setting_wins(load: Load) -> None:
    assert load("name=one", "name=two").name == "two"


@pytest.mark.parametrize("kind", ["files", "table"])
def test_a_source_may_be_in_object_storage(load: Load, kind: str) -> None:
    path = load(source={"kind": kind, "path": "s3://bucket/a//b/"}).source.path
    assert path == "s3://bucket/a/b"
    said = refusal(load, source={"kind": kind, "path": "s3://key:secret@bucket/x"})
    assert "  source.path: write s3://bucket/prefix; keys and endpoint come from the" in said


def test_a_tokenizer_in_object_storage_is_refused(load: Load) -> None:
    said = refusal(load, embedding={**FILES["embedding"], "tokenizer": "s3://bucket/x"})
    assert "  embedding.tokenizer: only source.path, index.uri and state.uri may be in" in said


@pytest.mark.parametrize("part", ["index", "state"])
def test_an_address_in_object_storage_is_written_one_way_only(load: Load, part: str) -> None:
    for uri in ("s3://bucket/a/b", "s3://bucket/a//b/"):
        config = load(**{part: {**FILES[part], "uri": uri}})
        assert getattr(config, part).uri == "s3://bucket/a/b"
    for uri, said in (
        ("https://bucket/x", "begins with s3://, gs://"),
        ("s3://", "write s3://bucket/prefix"),
        ("s3:///x", "write s3://bucket/prefix"),
        ("s3://bucket/../x", "write s3://bucket/prefix"),
        ("s3://key:secret@bucket/x", "keys and endpoint come from the environment"),
        ("s3://bucket/x?endpoint=y", "keys and endpoint come from the environment"),
    ):
        assert f"  {part}.uri: " in (
            refused := refusal(load, **{part: {**FILES[part], "uri": uri}})
        )
        assert said in refused


def paths_of(config: Config) -> list[str]:
    return [config.source.path, config.index.uri, config.state.uri]


def test_paths_start_from_the_folder_of_the_config(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    expected = [str(tmp_path / name) for name in ("docs", "data/index", "data/state")]
    assert paths_of(load()) == expected


def test_paths_start_from_the_nearest_parent_with_a_prefect_yaml(tmp_path: Path) -> None:
    inner = tmp_path / "outer" / "inner"
    (inner / "configs").mkdir(parents=True)
    for folder in (tmp_path / "outer", inner):
        (folder / "prefect.yaml").touch()
    file = inner / "configs" / "c.yaml"
    file.write_text(yaml.safe_dump(FILES), encoding="utf-8")
    assert paths_of(load_config(file))[0] == str(inner / "docs")
    (inner / "prefect.yaml").unlink()
    assert paths_of(load_config(file))[0] == str(tmp_path / "outer" / "docs")


def test_a_config_named_from_the_working_directory_resolves_the_same(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absolute = load()
    monkeypatch.chdir(tmp_path)
    assert load_config("c.yaml") == absolute


def test_absolute_home_and_file_paths_are_taken_as_they_are(load: Load, tmp_path: Path) -> None:
    config = load(
        source={"kind": "files", "path": "~/docs"},
        index={"uri": f"file://{tmp_path}/i", "table": "t"},
        state={"uri": f"{tmp_path}/x/../s"},
    )
    home = os.path.realpath(Path.home() / "docs")
    assert paths_of(config) == [home, str(tmp_path / "i"), str(tmp_path / "s")]


def test_overrides_know_no_other_keys() -> None:
    with pytest.raises(ValueError, match="dry_run"):
        Overrides.model_validate({"dry_run": True})
