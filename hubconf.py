"""Entry points of ``torch.hub``: ``torch.hub.load("OWNER/REPOSITORY", "explainer", "path or user/name")``."""

dependencies = ["torch", "torchvision", "segmentation_models_pytorch", "safetensors", "huggingface_hub"]


def explainer(source, revision=None, local_files_only=False):
    """A trained Explainer: images ``[B,3,H,W]`` in [0,1] -> class masks ``[B,K,H,W]`` in [0,1].

    Args:
        source: a checkpoint, an export folder, a .safetensors file, or a Hugging Face repository ``user/name``.
        revision, local_files_only: of the repository.
    """
    from explainer.export.safetensors import from_pretrained

    return from_pretrained(source, revision, local_files_only)
