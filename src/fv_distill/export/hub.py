"""Uploading an exported directory to the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi


def push_directory(directory: str | Path, repo_id: str, *, private: bool = False) -> str:
    """Create the model repository if need be, upload the directory, and return the repository's address.

    The token is the one of `hf auth login` or the environment; it is never read here.

    Raises:
        FileNotFoundError: if the directory is no diffusers directory.
        ValueError: if the Hub refuses, with its reason.
    """
    from huggingface_hub.errors import HfHubHTTPError

    directory = Path(directory)
    if not (directory / "model_index.json").is_file():
        raise FileNotFoundError(f"{directory} has no model_index.json; export the student first")
    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True, repo_type="model")
        api.upload_folder(repo_id=repo_id, folder_path=directory, commit_message="Upload few-step student")
    except HfHubHTTPError as error:
        raise ValueError(
            f"the Hub refused {repo_id!r}: {error}; check `hf auth whoami` and your rights on the repository. "
            f"The export itself is safe in {directory}"
        ) from error
    return str(url)
