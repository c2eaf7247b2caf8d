"""What a policy in bfloat16 would lose: python -m benchmarks.bf16

The shipped student of one evaluation, 100 noises. The network runs once, in float32. Then its
output is rounded to bfloat16, or the policy and its rollout compute in bfloat16. Printed is the
RMSE of the end, in latents, to the same rollout in float32.
"""

import torch

import piflow_minimal as core
from common.fashion import ASSETS
from common.teachers import endpoint_rmse
from imagenet.checkpoints import load_dit
from imagenet.dit import dit_student


def in_bfloat16(policy: core.GMFlowPolicy) -> core.GMFlowPolicy:
    """The same policy, its mixture and source rounded to bfloat16."""
    mixture = core.GaussianMixture(*(part.bfloat16() for part in policy.mixture))
    return core.GMFlowPolicy(mixture, policy.x_src.bfloat16(), policy.t_src)


@torch.no_grad()
def main() -> None:
    """Prints the three distances."""
    net = load_dit(ASSETS / "tiny_student.safetensors")
    noise = torch.randn(100, 4, 14, 14, generator=torch.Generator().manual_seed(0))
    outputs = dit_student(net, torch.arange(100) % 10)(noise, torch.ones(100))
    upcast = core._upcast
    for substeps in (8, 32, 128):
        options = {"total_substeps": substeps}
        exact = core.rollout(outputs, noise, 1.0, 0.0, **options)
        rounded = core.rollout(in_bfloat16(outputs), noise, 1.0, 0.0, **options)
        core._upcast = lambda x: x.bfloat16()  # policies and rollout compute in what this returns
        whole = core.rollout(in_bfloat16(outputs), noise, 1.0, 0.0, **options)
        core._upcast = upcast
        a, b = endpoint_rmse(rounded, exact), endpoint_rmse(whole.float(), exact)
        print(f"{substeps:3d} Euler substeps: output in bf16 {a:.4f}, all in bf16 {b:.4f}")


if __name__ == "__main__":
    main()
