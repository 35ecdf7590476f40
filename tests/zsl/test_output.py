"""Output directories appear whole or not at all."""

from pathlib import Path

import pytest

from bda_fused.zsl.output import OutputError, check_output, new_directory


def write_run(path: Path, text: str, overwrite: bool = False) -> None:
    with new_directory(path, overwrite=overwrite, marker="metrics.json") as partial:
        (partial / "metrics.json").write_text(text)


def test_a_new_directory_appears_with_its_parents_and_nothing_beside_it(tmp_path):
    write_run(tmp_path / "a" / "b", "1")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert (tmp_path / "a" / "b" / "metrics.json").read_text() == "1"


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(tmp_path, failure):
    def write_half() -> None:
        with new_directory(tmp_path / "there" / "new" / "newer" / "out", overwrite=False, marker="m") as partial:
            (partial / "half").write_text("")
            raise failure

    (tmp_path / "there").mkdir()
    with pytest.raises(failure):
        write_half()
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]


def test_a_failure_keeps_a_new_parent_that_somebody_else_uses_by_then(tmp_path):
    def fail() -> None:
        with new_directory(tmp_path / "new" / "out", overwrite=False, marker="m"):
            (tmp_path / "new" / "other").mkdir()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.rglob("*")) == [tmp_path / "new", tmp_path / "new" / "other"]


def test_a_system_that_refuses_the_directory_is_a_refusal_before_the_work(tmp_path, monkeypatch):
    mkdir = Path.mkdir

    def fail_on_partial(self: Path, *args: object, **kwargs: object) -> None:
        if self.name.endswith(".partial"):
            raise OSError("no space left")
        mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", fail_on_partial)
    with pytest.raises(OutputError, match="out cannot be made: no space left"):
        write_run(tmp_path / "new" / "out", "1")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_directory_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    write_run(tmp_path / "out", "1")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "metrics.json").read_text() == "1"


def test_overwrite_replaces_an_earlier_output_and_drops_its_files(tmp_path):
    write_run(tmp_path / "out", "1")
    (tmp_path / "out" / "stale").write_text("")
    write_run(tmp_path / "out", "2", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {"metrics.json": "2"}


def test_a_failure_while_overwriting_keeps_the_earlier_output(tmp_path, monkeypatch):
    write_run(tmp_path / "out", "1")
    rename = Path.rename

    def fail_on_partial(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError("disk full")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_on_partial)
    with pytest.raises(OSError, match="disk full"):
        write_run(tmp_path / "out", "2", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "metrics.json").read_text() == "1"


def test_refusals(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OutputError, match="file is a file, and the output must be a directory"):
        check_output(file, overwrite=True, marker="metrics.json")
    with pytest.raises(OutputError, match="file/new/out cannot be made, as .*/file is a file"):
        check_output(file / "new" / "out", overwrite=True, marker="metrics.json")
    with pytest.raises(OutputError, match="is not empty; choose another directory or pass --overwrite"):
        check_output(tmp_path, overwrite=False, marker="metrics.json")
    with pytest.raises(OutputError, match="holds no metrics.json, so it is not an earlier output"):
        check_output(tmp_path, overwrite=True, marker="metrics.json")
    check_output(tmp_path / "new", overwrite=False, marker="metrics.json")


def test_a_directory_that_nobody_may_write_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)  # root may write everywhere
    with pytest.raises(OutputError, match=f"out cannot be made, as {tmp_path} cannot be written to"):
        check_output(tmp_path / "new" / "out", overwrite=False, marker="metrics.json")
