"""What the tests of text_to_image/ share: the recorded cases, small models, comparisons.

tests/data/t2i: tiny random transformers (2 layers, 24 wide) with adapters in the published layout,
and what a public implementation computed with them on a CPU in float32: direct calls (`direct_*`,
`b2_*`: a batch of two) and the final latents of whole runs (`run_*`).
"""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="needs requirements-extra.txt (diffusers)")
pytest.importorskip("transformers", reason="needs requirements-extra.txt (transformers)")
pytest.importorskip("peft", reason="needs requirements-extra.txt (peft)")

import diffusers  # noqa: E402

import text_to_image.families as dm  # noqa: E402
from text_to_image.adapters import apply_adapter, policy_of, read_adapter  # noqa: E402
from text_to_image.few_step import FewStep  # noqa: E402
from text_to_image.generate import load  # noqa: E402

DATA = Path(__file__).parent / "data" / "t2i"
CASES = {
    "gmqwen": "qwen",
    "dxqwen": "qwen",
    "dxqwen_poly": "qwen",
    "gmflux": "flux",
    "dxflux": "flux",
    "gmflux2": "flux2",
}
GM = [case for case in CASES if case.startswith("gm")]
DX = [case for case in CASES if case.startswith("dx")]
SIZE = {"height": 64, "width": 48}


def transformer(case: str) -> torch.nn.Module:
    cls = getattr(diffusers, dm.FAMILIES[CASES[case]].transformer)
    folder = DATA / case.removesuffix("_poly") / "base_transformer"
    return cls.from_pretrained(folder, local_files_only=True)


class Bare:
    """What of a pipeline a network call needs."""

    _execution_device = torch.device("cpu")

    def __init__(self, network):
        self.transformer = network


@functools.cache
def few_step(case: str, scale: float = 1.0, folder: Path | None = None) -> FewStep:
    """A recorded adapter on its base; shared by tests, which leave it as it is."""
    adapter = read_adapter(str(folder or DATA / case / "adapter"))
    network = transformer(case)
    apply_adapter(network, adapter, scale)
    return FewStep(Bare(network), dm.FAMILIES[CASES[case]], policy_of(adapter), 4, True)


@functools.cache
def tiny(model: str) -> FewStep:
    """A tiny model; shared by tests, which leave it as it is."""
    return load(model, tiny=True, device="cpu")


class Recorded:
    """The arrays of one case."""

    def __init__(self, case: str):
        self.arrays = dict(np.load(DATA / case / "io.npz"))
        guidance = self.arrays.get("guidance_scale")
        self.guidance = None if guidance is None else float(guidance)

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[key])

    def runs(self) -> list[str]:
        return [key[4:-6] for key in self.arrays if key.startswith("run_")]

    def conditions(self, prefix: str = "", mask: str | None = None) -> dm.Conditions:
        pooled = f"{prefix}pooled_prompt_embeds"
        return dm.Conditions(
            self[f"{prefix}prompt_embeds"],
            mask=None if mask is None else self[mask],
            pooled=self[pooled] if pooled in self.arrays else None,
        )


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)
