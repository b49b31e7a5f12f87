"""`--push-to-hub`: checked before the work, uploaded after it; the Hub itself is a stub that writes down its calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import weft
from weft.cli import app
from weft.verbs import export


class Hub:
    """HfApi, as far as it is used."""

    calls: ClassVar[list[tuple[Any, ...]]] = []
    logged_in = True
    full = False

    def whoami(self) -> dict[str, str]:
        self.calls.append(("whoami",))
        if not self.logged_in:
            raise huggingface_hub.errors.LocalTokenNotFoundError("Token is required")
        return {"name": "me"}

    def create_repo(self, name: str, *, exist_ok: bool) -> huggingface_hub.RepoUrl:
        self.calls.append(("create", name, exist_ok))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{name}")

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        if self.full:
            raise OSError("no space there")
        self.calls.append(("upload", repo_id, sorted(file.name for file in Path(folder_path).iterdir())))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr(Hub, "calls", [])
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return Hub


@pytest.fixture
def small(tiny_directory: Path, tmp_path: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(tiny_directory)
    weft.compress(model, "svd", budget=0.5)
    model.save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def merge(small: Path, out: Path, *more: str) -> Any:
    return CliRunner().invoke(app, ["merge", str(small), "-o", str(out), "--device", "cpu", "--json", *more])


def test_what_is_written_is_uploaded_after_the_work(hub: type[Hub], small: Path, tmp_path: Path) -> None:
    done = merge(small, tmp_path / "out", "--push-to-hub", "me/plain")
    assert done.exit_code == 0, done.output
    assert [call[0] for call in hub.calls] == ["whoami", "create", "upload"]
    assert hub.calls[1] == ("create", "me/plain", True)
    assert {"model.safetensors", "config.json", "README.md", "run.json"} <= set(hub.calls[2][2])
    assert "me/plain" not in (tmp_path / "out/run.json").read_text(), "it decides nothing of what is written"


def test_nothing_begins_where_it_cannot_end(
    hub: type[Hub], small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = merge(small, tmp_path / "out", "--push-to-hub", "me/a name")
    assert refused.exit_code == 2 and "is no name of a repository" in refused.output
    monkeypatch.setattr(hub, "logged_in", False)
    refused = merge(small, tmp_path / "out", "--push-to-hub", "me/plain")
    assert refused.exit_code == 2 and "hf auth login" in refused.output and not (tmp_path / "out").exists()


def test_a_failed_upload_keeps_the_output(
    hub: type[Hub], small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "full", True)
    failed = merge(small, tmp_path / "out", "--push-to-hub", "me/plain")
    assert failed.exit_code == 2 and "no space there" in failed.output and "hf upload me/plain" in failed.output
    assert (tmp_path / "out/model.safetensors").is_file()


def test_verbs_that_write_take_it_and_others_do_not() -> None:
    import typer

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    taking = {name for name, command in commands.items() if any(p.name == "push_to_hub" for p in command.params)}
    assert taking >= {"compress", "finetune", "pretrain", "merge", "combine", "quantize", "export"}
    assert not taking & {"inspect", "eval", "methods", "demo"}


def test_cards_are_read_by_the_hub_library(small: Path, tmp_path: Path) -> None:
    """Of a merged model and of an export, with what the source's card says of its licence."""
    (small / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: org/base\n---\n# It\n")
    assert merge(small, tmp_path / "out").exit_code == 0
    export.run(str(small), tmp_path / "hf", format="hf", device="cpu")
    for place in ("out", "hf"):
        data = huggingface_hub.ModelCard.load(tmp_path / place / "README.md").data
        assert data.license == "apache-2.0" and data.base_model == "org/base" and "weft" in data.tags
        assert data.pipeline_tag == "text-generation" and data.library_name == "transformers"
