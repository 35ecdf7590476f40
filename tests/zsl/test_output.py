"""Output directories appear whole or not at all."""

from pathlib import Path

import pytest

from bda_fused.zsl.output import check_output, new_directory


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
        with new_directory(tmp_path / "out", overwrite=False, marker="m") as partial:
            (partial / "half").write_text("")
            raise failure

    with pytest.raises(failure):
        write_half()
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
    with pytest.raises(ValueError, match="file is a file, and the output must be a directory"):
        check_output(file, overwrite=True, marker="metrics.json")
    with pytest.raises(ValueError, match="is not empty; choose another directory or pass --overwrite"):
        check_output(tmp_path, overwrite=False, marker="metrics.json")
    with pytest.raises(ValueError, match="holds no metrics.json, so it is not an earlier output"):
        check_output(tmp_path, overwrite=True, marker="metrics.json")
    check_output(tmp_path / "new", overwrite=False, marker="metrics.json")
