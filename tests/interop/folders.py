"""Model folders in the Hugging Face layout, as the tests write and compare them."""

import json

import safetensors
import safetensors.numpy


def write(folder, config, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def stored(folder):
    """Name -> dtype, shape and raw bytes of every tensor in the file."""
    return dict(safetensors.deserialize((folder / "model.safetensors").read_bytes()))
