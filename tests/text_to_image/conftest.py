"""Fixtures of the tests of text_to_image/."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

DATA = Path(__file__).parent.parent / "data" / "t2i"


@pytest.fixture
def recorded_frequencies(monkeypatch):
    """Pins the last bit of the sinusoids' frequencies in the FLUX time embeddings to the recording.

    diffusers computes exp(-k log(10000) / half) in float32, and how exp rounds differs between
    machines and PyTorch versions. FLUX multiplies by 1000 t and 1000 guidance, up to 4000: one last
    bit moves the bare base transformer of diffusers by up to 1e-4. The recording has the correctly
    rounded values, for half = 32 except for the neighbour above at k = 3.
    """

    embeddings = pytest.importorskip("diffusers.models.embeddings")

    def embedding(timesteps, width, flip_sin_to_cos, downscale_freq_shift, scale=1):
        assert flip_sin_to_cos and downscale_freq_shift == 0
        k = torch.arange(width // 2, dtype=torch.float32)
        frequencies = (-math.log(10000) * k / len(k)).double().exp().float()
        if len(k) == 32:
            frequencies[3] = frequencies[3].nextafter(torch.tensor(1.0))
        angles = scale * (timesteps[:, None].float() * frequencies)
        return torch.cat([angles.cos(), angles.sin()], -1)

    monkeypatch.setattr(embeddings, "get_timestep_embedding", embedding)


@pytest.fixture
def edited(tmp_path):
    """Copies a case's adapter and edits its tensors, config or metadata -> folder."""

    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    def make(case, tensors=None, config=None, metadata=..., class_name=None) -> Path:
        folder = tmp_path / f"edited{len(list(tmp_path.iterdir()))}"
        shutil.copytree(DATA / case / "adapter", folder)
        path = folder / "diffusion_pytorch_model.safetensors"
        with safe_open(path, "pt") as file:
            old = file.metadata()
        values = load_file(path)
        (tensors or (lambda values: None))(values)
        save_file(values, path, metadata=old if metadata is ... else metadata)
        settings = json.loads((folder / "config.json").read_text()) | (config or {})
        (folder / "config.json").write_text(json.dumps(settings))
        return folder

    return make
