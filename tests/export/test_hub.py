from typing import ClassVar

import pytest

from fv_distill.export import hub


class FakeApi:
    calls: ClassVar[list] = []

    def create_repo(self, repo_id, **kwargs):
        self.calls.append(("create", repo_id, kwargs["private"]))
        return f"https://hub.example/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.calls.append(("upload", repo_id, folder_path.name))


def test_push_creates_then_uploads(tiny_wan, monkeypatch):
    monkeypatch.setattr(hub, "HfApi", FakeApi)
    assert hub.push_directory(tiny_wan, "me/student", private=True) == "https://hub.example/me/student"
    assert FakeApi.calls == [("create", "me/student", True), ("upload", "me/student", tiny_wan.name)]


def test_only_exports_are_pushed(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "HfApi", FakeApi)
    with pytest.raises(FileNotFoundError, match=r"no model_index\.json"):
        hub.push_directory(tmp_path, "me/student")
