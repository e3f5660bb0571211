"""A model's files on their way through Redis: what is taken, and what a blob is."""

from pathlib import Path

import msgspec
import pytest

from kvstore import model_files


def test_only_what_a_router_needs_is_read(tmp_path: Path) -> None:
    """Of a folder, the named files; weights stay, and so does a folder of such a name."""
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    (tmp_path / "chat_template.jinja").write_bytes(b"")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").mkdir()
    assert model_files.read(tmp_path) == {"tokenizer.json": b"{}", "chat_template.jinja": b""}


def test_a_folder_without_them_gives_none(tmp_path: Path) -> None:
    """Neither an empty folder nor a missing one is an error here: who needs a file says that it is missing."""
    assert model_files.read(tmp_path) == {}
    assert model_files.read(tmp_path / "nothing") == {}


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It must not be left out in silence."""
    (tmp_path / "tokenizer.json").write_bytes(b"{}")

    def refuse(path: Path) -> bytes:
        raise PermissionError(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(PermissionError):
        model_files.read(tmp_path)


def test_equal_files_make_equal_blobs() -> None:
    """Whatever their order: blobs are stored by their content's hash, and a fleet must share one."""
    files = {"tokenizer.json": bytes(range(256)), "config.json": b"{}"}
    blob = model_files.pack(files)
    assert blob == model_files.pack(dict(reversed(files.items())))
    assert model_files.unpack(blob) == files
    assert model_files.unpack(model_files.pack({})) == {}


@pytest.mark.parametrize(
    "blob",
    [b"", b"\xc1", msgspec.msgpack.encode(["tokenizer.json"]), msgspec.msgpack.encode({"tokenizer.json": 1}), b"\x80x"],
    ids=["nothing", "no msgpack", "a list", "a number for a file", "more behind it"],
)
def test_what_is_no_blob_is_refused(blob: bytes) -> None:
    """One error, whatever is wrong with it."""
    with pytest.raises(ValueError, match="not a blob of model files"):
        model_files.unpack(blob)


def test_the_demo_model_has_what_a_router_needs() -> None:
    """Tokeniser and chat template are among its files."""
    folder = Path(__file__).parents[2] / "model_repository" / "demo" / "1" / "model"
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= model_files.read(folder).keys()
