"""The default artefact: a folder with ``model.safetensors``, ``config.json`` and a model card, as on the Hugging Face Hub.

Nothing in it is executed on loading; a local folder and a Hub repository behave the same, so it works offline.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from explainer.errors import CheckpointError, ConfigError
from explainer.export.card import write_card
from explainer.files import replacing, write_json
from explainer.inference.classifier import Given
from explainer.inference.describe import describe
from explainer.inference.eager import EagerRuntime
from explainer.inference.formats import ExportFormat, ExportModel, ExportOptions
from explainer.inference.loading import CONFIG, WEIGHTS, load
from explainer.models.explainer import Explainer


class SafeTensors(ExportFormat):
    """``model.safetensors`` with ``config.json``."""

    name = "safetensors"
    suffix = ".safetensors"
    fusable = False

    def write(self, model: ExportModel, path: Path, options: ExportOptions) -> None:
        """See :class:`ExportFormat`."""
        self.check(options)
        if not isinstance(model.module, Explainer):
            raise ConfigError("safetensors stores an Explainer alone; for classifier and Explainer in one file use --format onnx --fused.")
        _write(model.module, path, path.parent / CONFIG)

    def open(self, path: Path, threads: int | None = None, given: Given | None = None) -> EagerRuntime:
        """See :class:`ExportFormat`."""
        return EagerRuntime(load(path, given=given), threads)


def _write(net: Explainer, weights: Path, config: Path) -> None:
    from safetensors.torch import save

    state = {key: value.detach().cpu().contiguous().clone() for key, value in net.state_dict().items()}
    with replacing(weights) as stream:
        stream.write(save(state, metadata={"format": "pt"}))
    write_json(config, {**net.metadata, "explainer": net.config})


def save_pretrained(net: Explainer, folder: str | Path) -> Path:
    """Write ``model.safetensors``, ``config.json`` and ``README.md`` (a model card) into ``folder``; returns it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write(net, folder / WEIGHTS, folder / CONFIG)
    write_card(folder, describe(net))
    return folder


def from_pretrained(name: str | Path, revision: str | None = None, local_files_only: bool = False) -> Explainer:
    """An Explainer from whatever :func:`explainer.load` takes, or from the Hub repository ``user/name`` (or its local cache).

    Raises:
        CheckpointError: neither exists or can be reached.
    """
    if Path(name).exists():
        return load(name)
    if Path(name).is_absolute() or str(name).count("/") != 1:
        raise CheckpointError(f"{name} is neither a file, a folder nor a Hub repository of the form user/name.")
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            str(name), revision=revision, local_files_only=local_files_only, allow_patterns=[WEIGHTS, CONFIG, "README.md"]
        )
    except Exception as error:  # the hub client raises many types, for network, authorisation and cache
        raise CheckpointError(
            f"Hub repository {name!r} could not be obtained ({type(error).__name__}: {str(error).strip()[:200]}). "
            "Without network, copy its files into a folder and give that folder."
        ) from error
    return load(folder)


def push_to_hub(net: Explainer, repository: str, private: bool = True, api: Any = None) -> str:
    """Upload what :func:`save_pretrained` writes to the Hub repository ``user/name``, created if needed; returns its address.

    Args:
        private: whether a repository that is created is private.
        api: a ``huggingface_hub.HfApi``, default one with the user's own login.
    """
    import tempfile

    if api is None:
        from huggingface_hub import HfApi

        api = HfApi()
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(net, folder)
        try:
            url = api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(repo_id=repository, folder_path=folder)
        except Exception as error:
            raise CheckpointError(
                f"could not upload to {repository!r} ({type(error).__name__}: {str(error).strip()[:200]}). Log in with `hf auth login`."
            ) from error
    return str(url)
